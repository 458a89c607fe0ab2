"""The data room: from what the user named to the micro-batches of each optimizer step.

    reading    a file, folder, hub dataset or list  ->  rows with file and line
    shapes     a row                                 ->  a conversation, or text with a part that is trained
    rendering  a conversation                        ->  text in pieces, each with loss or without
    encoding   text                                  ->  token ids and the mask of what is trained
    fitting    long rows cut, untrained rows left out, all counted
    tokens     the rows on disk, memory-mapped
    sampling   (seed, epoch, step)                   ->  the window of that step

`prepare` runs the first six and gives a report; `WindowSampler` is the last. Order, masks and loss weights are decided
here, once, so that they are equal on every backend.
"""

from qlora_hal.data.prepare import PreparedData, prepare
from qlora_hal.data.preview import show_batch
from qlora_hal.data.report import DataReport, SourceReport
from qlora_hal.data.source.sampling import WindowSampler, evaluation_batches
from qlora_hal.data.template.chat_template import BUILT_IN as BUILT_IN_TEMPLATES
from qlora_hal.data.tokens.store import TokenStore
from qlora_hal.data.tokens.tokenizer import ChatTokenizer

__all__ = [
    "BUILT_IN_TEMPLATES",
    "ChatTokenizer",
    "DataReport",
    "PreparedData",
    "SourceReport",
    "TokenStore",
    "WindowSampler",
    "evaluation_batches",
    "prepare",
    "show_batch",
]
