"""What leaves a run: its adapter in another tool's files (`converting`), or adapter and base made into one ordinary
16-bit model, and the proof that it is still the model that was trained.

    subject     a run or an adapter          ->  which adapter, which base, stored how
    rows        the run's validation rows    ->  batches that both models are judged on
    reference   the adapter model            ->  its logits on them, kept on disk
    weights     base weight and adapter      ->  merged tensors, one at a time
    shards      tensors                      ->  safetensors files of at most 5 GB
    folder      files beside the weights     ->  a complete Hugging Face folder
    limits      logits and rounding          ->  how far the merged model may be from the adapter model
    carrying    all of it, in a staging folder that is renamed at the end

Only the contract's views are used (`dequantized_weight`, `logits`), so every backend and weight format is served.
"""

from qlora_hal.export.carrying import carry_out
from qlora_hal.export.request import BaseChoice, MergeRequest, MergeResult, OutputDtype

__all__ = ["BaseChoice", "MergeRequest", "MergeResult", "OutputDtype", "carry_out"]
