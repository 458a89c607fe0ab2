"""What another tool's file becomes: each key taken, translated, not needed, or named as without a place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from other_tools.conftest import BY_TOOL, FILES, Importer

from qlora_hal.config.fields import settings
from qlora_hal.config.other_tools.catalogue import TOOLS
from qlora_hal.config.other_tools.importing import Imported, imported
from qlora_hal.config.other_tools.reference import with_tables
from qlora_hal.config.other_tools.tables import Fate, Given, Tool
from qlora_hal.errors import ConfigError, QloraHalError

PAGE = Path(__file__).parents[2] / "docs" / "from_other_tools.md"


def note_of(made: Imported, key: str) -> str:
    return next(line.outcome.note for line in made.lines if line.key == key)


@pytest.mark.parametrize("tool", [tool.name for tool in TOOLS])
def test_a_published_configuration_is_recognized_and_every_key_of_it_is_known(tool: str) -> None:
    made = imported(FILES / BY_TOOL[tool])
    assert made.tool.name == tool
    assert made.unknown == ()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_setting_that_a_table_names_exists(tool: object) -> None:
    assert [key.here for key in tool.keys if key.here and key.here not in settings()] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_key_stands_once_in_a_table(tool: object) -> None:
    names = [name for key in tool.keys for name in key.names]  # type: ignore[attr-defined]
    assert sorted(names) == sorted(set(names))


def test_the_page_holds_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page)


def test_axolotl_is_taken_with_its_own_defaults() -> None:
    made = imported(FILES / "axolotl.yml")
    assert made.settings["quantization.weight_format"] == "nf4"
    assert made.settings["lora.target_modules"] == "all-linear"
    assert made.settings["data.path"] == "teknium/GPT4-LLM-Cleaned"
    assert made.settings["data.validation_fraction"] == 0.1
    assert made.settings["training.optim"] == "adamw_8bit"
    assert made.settings["data.truncation"] == "drop"  # Axolotl drops long rows unasked
    assert "checkpoint.save_steps" not in made.settings  # saves_per_epoch, which has no place here, says it there
    assert "evals_per_epoch" in {line.key for line in made.with_fate(Fate.NO_PLACE)}
    assert "wandb_project" in made.unset


def test_mlx_lms_scale_is_alpha_over_rank_and_its_counts_are_micro_batches(import_text: Importer) -> None:
    text = "iters: 100\ngrad_accumulation_steps: 4\nsave_every: 20\nlora_parameters: {rank: 8, scale: 20.0, dropout: 0}"
    made = import_text(text + "\nmodel: some/base-4bit\ndata: some/rows\n")
    assert made.settings["lora.alpha"] == 160.0
    assert made.settings["training.max_steps"] == 25
    assert made.settings["checkpoint.save_steps"] == 5
    assert "20 x 8" in note_of(made, "lora_parameters.scale")


def test_mlx_lms_last_layers_become_an_expression_when_the_base_is_here(import_text: Importer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    keys = "lora_parameters: {rank: 8, scale: 1.0, keys: [self_attn.q_proj]}"
    made = import_text(f"model: {tmp_path}\nnum_layers: 2\niters: 1\n{keys}\n")
    assert made.settings["lora.target_modules"] == r"model\.layers\.(?:2|3)\.(?:self_attn\.q_proj)"
    assert made.settings["quantization.weight_format"] == "none"  # mlx-lm never quantizes


def test_how_many_layers_an_absent_base_has_is_not_guessed(import_text: Importer) -> None:
    made = import_text("model: some/base\nnum_layers: 2\niters: 1\n")
    assert made.settings.get("lora.target_modules", "all-linear") == "all-linear"
    assert "not on this disk" in note_of(made, "num_layers")


def test_mlx_lms_adam_has_no_decay_and_its_adamw_has(import_text: Importer) -> None:
    adam = import_text("optimizer: adam\niters: 1\nmodel: a/b\n").settings
    adamw = import_text("optimizer: adamw\niters: 1\nmodel: a/b\n").settings
    assert (adam["training.weight_decay"], adamw["training.weight_decay"]) == (0.0, 0.01)


def test_llama_factorys_alpha_is_twice_the_rank_unless_it_is_given(import_text: Importer) -> None:
    base = "stage: sft\nmodel_name_or_path: a/b\nlora_rank: 32\n"
    assert import_text(base).settings["lora.alpha"] == 64
    assert import_text(f"{base}lora_alpha: 8\n").settings["lora.alpha"] == 8


def test_llama_factorys_data_sets_are_looked_up_where_they_are_declared(import_text: Importer, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}, "theirs": {"hf_hub_url": "a/b"}}')
    base = f"stage: sft\nmodel_name_or_path: a/b\ndataset_dir: {tmp_path}\n"
    assert import_text(f"{base}dataset: mine\n").settings["data.path"] == str(tmp_path / "mine.json")
    made = import_text(f"{base}dataset: theirs, mine\n")
    assert made.settings["data.sources"] == [{"path": "a/b"}, {"path": str(tmp_path / "mine.json")}]
    assert import_text(f"{base}dataset: other\n").missing == ("data.path", "output_dir")


def test_trl_trains_all_tokens_and_peft_two_modules_unless_they_are_told(import_text: Importer) -> None:
    made = import_text("dataset_name: a/b\nuse_peft: true\nmodel_name_or_path: c/d\n")
    assert made.settings["data.train_on"] == "all"
    assert made.settings["lora.target_modules"] == ["q_proj", "v_proj"]
    assert made.settings["lora.alpha"] == 32
    assert made.settings["quantization.weight_format"] == "none"


def test_what_trains_all_weights_there_is_said_although_no_key_says_it(import_text: Importer) -> None:
    made = import_text("dataset_name: a/b\nmodel_name_or_path: c/d\n")
    assert "all weights are trained there" in note_of(made, "use_peft")


def test_a_script_is_read_and_not_run() -> None:
    made = imported(FILES / "trl_script.py")
    assert made.settings["model.name_or_path"] == "facebook/opt-350m"  # through a name
    assert made.settings["quantization.compute_dtype"] == "bfloat16"
    assert made.settings["quantization.double_quant"] is True
    assert made.settings["lora.r"] == 16
    assert "computes it (len(dataset))" in note_of(made, "max_steps")


def test_an_unsloth_script_gives_its_first_model_and_all_tokens() -> None:
    made = imported(FILES / "unsloth_script.py")
    assert made.settings["model.name_or_path"] == "unsloth/Llama-3.1-8B"
    assert made.settings["data.train_on"] == "all"
    assert made.settings["training.optim"] == "adamw_8bit"


def test_a_call_for_answers_only_is_seen(import_text: Importer) -> None:
    text = (FILES / "unsloth_script.py").read_text() + "\ntrainer = train_on_responses_only(trainer)\n"
    assert import_text(text, "script.py").settings["data.train_on"] == "assistant"


def test_a_name_that_is_set_twice_is_computed(import_text: Importer) -> None:
    text = (FILES / "unsloth_script.py").read_text() + "\nload_in_4bit = False\n"
    assert "the script computes it" in note_of(import_text(text, "script.py"), "from_pretrained.load_in_4bit")


def test_a_notebook_is_read_without_its_shell_lines(import_text: Importer) -> None:
    cells = '[{"cell_type": "code", "source": ["!pip install unsloth \\\\\\n", "    trl\\n"]}, '
    code = "model = FastLanguageModel.from_pretrained('a/b', load_in_4bit=True)"
    text = '{"cells": ' + cells + '{"cell_type": "code", "source": "%time\\n' + code + '"}]}'
    assert import_text(text, "note.ipynb").settings["model.name_or_path"] == "a/b"


def test_of_two_keys_for_one_setting_the_first_counts_and_the_other_is_named(import_text: Importer) -> None:
    made = import_text("base_model: a/b\nadapter: lora\nadam_epsilon: 1e-8\nadam_eps: 1e-5\n")
    assert made.settings["training.adam_epsilon"] == 1e-8
    assert "and counts" in note_of(made, "adam_eps")


def test_keys_without_a_place_here_do_not_make_a_file_one_of_trl(import_text: Importer) -> None:
    accelerate = (
        "compute_environment: LOCAL_MACHINE\nfsdp_config: {fsdp_version: 2}\nuse_cpu: false\nnum_processes: 2\n"
    )
    with pytest.raises(ConfigError, match="QH-U60"):
        import_text(accelerate)


def test_an_unknown_key_is_named(import_text: Importer) -> None:
    assert import_text("base_model: a/b\nfrobnicate: 3\n").unknown == ("frobnicate",)


def test_evaluation_without_rows_is_left_with_a_note(import_text: Importer) -> None:
    made = import_text("base_model: a/b\neval_steps: 5\n")
    assert "training.eval_steps" not in made.settings
    assert "held-out rows" in note_of(made, "eval_steps")


def test_a_wrong_value_is_refused_with_its_line(import_text: Importer) -> None:
    with pytest.raises(ConfigError) as caught:
        import_text("base_model: a/b\nlora_r: true\n")
    assert (caught.value.code, caught.value.where) == ("QH-U01", "theirs.yaml:2")
    with pytest.raises(ConfigError) as caught:
        import_text("base_model: a/b\nlearning_rate: 5\n")
    assert (caught.value.code, caught.value.where) == ("QH-U01", "theirs.yaml:2")


@pytest.mark.fault("U60")
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("frobnicate: 3\n", "none of the keys"),
        ("base_model: a/b\nlora_rank: 8\n", "keys of several tools"),
    ],
)
def test_a_file_of_no_clear_tool_is_asked_about(import_text: Importer, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        import_text(text)
    assert caught.value.code == "QH-U60"
    assert "--from-tool" in caught.value.fix


def test_the_tool_can_be_named(import_text: Importer) -> None:
    assert import_text("base_model: a/b\nlora_rank: 8\n", tool="axolotl").tool.name == "axolotl"
    with pytest.raises(ConfigError, match="no importer for 'torchtune'"):
        import_text("base_model: a/b\n", tool="torchtune")


@pytest.mark.fault("U61")
@pytest.mark.parametrize(
    ("text", "name", "objective"),
    [
        ("base_model: a/b\nrl: dpo\n", "a.yml", "rl: dpo"),
        ("stage: dpo\nmodel_name_or_path: a/b\n", "a.yaml", "stage: dpo"),
        ("from trl import GRPOConfig\nGRPOConfig(learning_rate=1e-5)\nSFTConfig(seed=1)\n", "a.py", "GRPOConfig"),
    ],
)
def test_another_objective_is_refused(import_text: Importer, text: str, name: str, objective: str) -> None:
    with pytest.raises(QloraHalError, match=objective) as caught:
        import_text(text, name)
    assert caught.value.code == "QH-U61"


@pytest.mark.parametrize(("text", "name"), [("def (:\n", "a.py"), ("{", "a.ipynb"), ("a: [\n", "a.yaml")])
def test_a_file_that_is_not_well_formed_is_refused(import_text: Importer, text: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_text(text, name)
    assert caught.value.code == "QH-U03"


def test_a_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    for name in ("none.yaml", "none.py"):
        with pytest.raises(ConfigError) as caught:
            imported(tmp_path / name)
        assert caught.value.code == "QH-U02"


# What a tool does, as its own code has it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "stored"),
    [
        ("adapter: lora\n", "none"),
        ("adapter: lora\nload_in_8bit: false\n", "none"),
        ("adapter: lora\nload_in_4bit: true\n", "nf4"),
        ("adapter: lora\nload_in_8bit: true\n", "8bit"),
        ("adapter: qlora\n", "nf4"),
        ("adapter: lora\ngptq: true\n", "auto"),
    ],
)
def test_axolotl_quantizes_only_what_it_is_asked_to(import_text: Importer, keys: str, stored: str) -> None:
    assert import_text(f"base_model: a/b\n{keys}").settings["quantization.weight_format"] == stored


def test_axolotls_linear_layers_come_beside_the_named_ones(import_text: Importer) -> None:
    both = "lora_target_modules: [q_proj]\nlora_target_linear: true\n"
    made = import_text(f"base_model: a/b\nadapter: lora\n{both}")
    assert made.settings["lora.target_modules"] == "all-linear"
    assert "adds every linear layer" in note_of(made, "lora_target_modules")


def test_axolotls_data_sets_are_all_taken_with_their_columns(import_text: Importer) -> None:
    turns = "message_property_mappings: {role: from, content: value}"
    one = f"{{path: x/y, type: chat_template, field_messages: talk, {turns}}}"
    two = "{path: z/w, type: completion, field: story, split: 'train[:5%]', name: main}"
    made = import_text(f"base_model: a/b\nadapter: lora\ndatasets: [{one}, {two}]\n")
    assert made.settings["data.sources"] == [
        {"path": "x/y", "columns": {"messages": "talk"}},
        {"path": "z/w", "columns": {"text": "story"}},
    ]
    assert "data.format" not in made.settings
    told = note_of(made, "datasets")
    assert "train[:5%] is a part of a split" in told
    assert "name of the data set is not taken" in told
    assert "message_property_mappings" not in told
    assert "data.path" not in made.missing


def test_files_of_a_hub_data_set_are_no_files_of_this_disk(import_text: Importer) -> None:
    hub = import_text("base_model: a/b\nadapter: lora\ndatasets: [{path: x/y, data_files: part.jsonl}]\n")
    assert hub.settings["data.path"] == "x/y"
    assert "part of it" in note_of(hub, "datasets")
    here = import_text("base_model: a/b\nadapter: lora\ndatasets: [{path: json, data_files: [a.jsonl, b.jsonl]}]\n")
    assert here.settings["data.sources"] == [{"path": "a.jsonl"}, {"path": "b.jsonl"}]


@pytest.mark.parametrize(
    ("call", "settings"),
    [
        ('load_dataset("json", data_files="rows.jsonl", split="train")', {"data.path": "rows.jsonl"}),
        (
            'load_dataset("csv", data_files=["a.csv", "b.csv"])',
            {"data.sources": [{"path": "a.csv"}, {"path": "b.csv"}]},
        ),
        ('load_dataset("json", data_files={"train": "a.jsonl", "test": "b.jsonl"})', {"data.path": "a.jsonl"}),
        ('load_dataset("x/y", data_files="part.jsonl")', {"data.path": "x/y"}),
        ('load_dataset("x/y")', {"data.path": "x/y"}),
    ],
    ids=["a file", "files", "files of splits", "files of a data set of the hub", "a data set of the hub"],
)
def test_the_rows_of_a_script_are_the_files_that_it_names(
    import_text: Importer, call: str, settings: dict[str, object]
) -> None:
    made = import_text(f"{call}\nSFTConfig(seed=1)\nSFTTrainer()\n", "a.py", "trl")
    assert {name: value for name, value in made.settings.items() if name in ("data.path", "data.sources")} == settings


def test_a_mapping_that_a_script_spreads_is_read_where_it_is_written_down(import_text: Importer) -> None:
    text = 'more = dict(r=64)\nLoraConfig(**more, **{"lora_dropout": 0.1})\nSFTConfig(**{"learning_rate": 3e-5})\n'
    made = import_text(f"{text}SFTTrainer()\n", "a.py", "trl")
    assert (made.settings["lora.r"], made.settings["lora.dropout"]) == (64, 0.1)
    assert made.settings["training.learning_rate"] == 3e-5
    assert not made.unknown
    computed = import_text("LoraConfig(**found())\nSFTConfig(seed=1)\nSFTTrainer()\n", "b.py", "trl")
    assert "check what stands above as not given" in note_of(computed, "LoraConfig.**")


@pytest.mark.parametrize("call", ['SFTTrainer("a/b")', 'SFTTrainer(model="a/b")'], ids=["first", "by name"])
def test_a_trainer_that_is_given_a_name_has_its_model(import_text: Importer, call: str) -> None:
    made = import_text(f"{call}\nSFTConfig(seed=1)\n", "a.py", "trl")
    assert made.settings["model.name_or_path"] == "a/b"
    assert "model.name_or_path" not in made.missing
    of_object = import_text("SFTTrainer(model=model)\nSFTConfig(seed=1)\n", "b.py", "trl")
    assert "read where it is made" in note_of(of_object, "SFTTrainer.model")


def test_a_script_without_an_adapter_is_told_to_train_all_weights_there(import_text: Importer) -> None:
    without = import_text('SFTTrainer("a/b")\nSFTConfig(seed=1)\n', "a.py", "trl")
    assert "all weights are trained there" in note_of(without, "use_peft")
    made = import_text('SFTTrainer("a/b", peft_config=LoraConfig(r=8))\nSFTConfig(seed=1)\n', "b.py", "trl")
    assert "use_peft" not in [line.key for line in made.lines]


def test_of_two_ways_to_say_the_warm_up_only_the_one_that_counts_is_written(import_text: Importer) -> None:
    text = "model: a/b\ndata: d\niters: 10\nlr_schedule: {name: cosine_decay, warmup: 3, arguments: [1e-5, 10]}\n"
    made = import_text(text, "a.yaml", "mlx-lm")
    assert made.settings["training.warmup_steps"] == 3
    assert "training.warmup_ratio" not in made.settings


def test_a_kind_of_file_is_no_path_where_the_script_computes_its_files(import_text: Importer) -> None:
    made = import_text('load_dataset("json", data_files=found())\nSFTConfig(seed=1)\nSFTTrainer()\n', "a.py", "trl")
    assert "data.path" not in made.settings
    assert "data.path" in made.missing
    assert "is a kind of file" in note_of(made, "load_dataset.path")


def test_a_data_set_that_is_listed_twice_is_taken_once_and_told(import_text: Importer) -> None:
    made = import_text("base_model: a/b\nadapter: lora\ndatasets: [{path: x/y}, {path: x/y}]\n")
    assert made.settings["data.path"] == "x/y"
    assert "more than once" in note_of(made, "datasets")


def test_mlx_lm_masks_all_but_the_last_answer(import_text: Importer) -> None:
    assert import_text("model: a/b\niters: 1\nmask_prompt: true\n").settings["data.train_on"] == "last"


def test_mlx_lms_first_updates_are_told_of_without_a_key(import_text: Importer) -> None:
    assert "does not correct the moments' bias" in note_of(import_text("model: a/b\niters: 1\n"), "optimizer")


def test_mlx_lms_hub_data_sets_keep_their_columns_and_default_splits_are_told(import_text: Importer) -> None:
    rows = "[{path: x/y, prompt_feature: q, completion_feature: answer, config: {name: main}}, {path: z/w}]"
    made = import_text(f"model: a/b\niters: 1\nhf_dataset: {rows}\n")
    columns = {"prompt": "q", "completion": "answer"}
    assert made.settings["data.sources"] == [{"path": "x/y", "columns": columns}, {"path": "z/w"}]
    assert "train[:80%]" in note_of(made, "hf_dataset")
    assert "config of x/y is not taken" in note_of(made, "hf_dataset")


@pytest.mark.parametrize(
    ("keys", "path", "value"),
    [
        ("stage: sft\nneat_packing: true\n", "data.packing", True),
        ("stage: sft\nneat_packing: true\npacking: false\n", "data.packing", True),
        ("stage: pt\n", "data.packing", True),
        ("stage: pt\npacking: false\n", "data.packing", False),
        ("stage: sft\nmask_history: true\n", "data.train_on", "last"),
        ("stage: sft\ntrain_on_prompt: false\nmask_history: true\n", "data.train_on", "last"),
        ("stage: sft\ntrain_on_prompt: false\nmask_history: false\n", "data.train_on", "assistant"),
        ("stage: sft\nmax_samples: 50\n", "data.max_rows", 50),
        ("stage: sft\ndisable_shuffling: true\n", "data.shuffle", False),
    ],
)
def test_llama_factorys_keys_of_rows_have_their_settings(
    import_text: Importer, keys: str, path: str, value: object
) -> None:
    assert import_text(f"model_name_or_path: a/b\nfinetuning_type: lora\n{keys}").settings[path] == value


@pytest.mark.parametrize(
    ("arguments", "then"),
    [
        ("completion_only_loss=False, assistant_only_loss=True", ""),
        ("assistant_only_loss=False, completion_only_loss=True", ""),
        ("completion_only_loss=False", "trainer = train_on_responses_only(trainer)"),
        ("assistant_only_loss=False", "trainer = train_on_responses_only(trainer)"),
    ],
)
def test_what_leaves_prompts_out_of_the_loss_counts_whatever_another_key_says(
    import_text: Importer, arguments: str, then: str
) -> None:
    script = f"from trl import SFTTrainer, SFTConfig\ntrainer = SFTTrainer('a/b', args=SFTConfig({arguments}))\n{then}"
    assert import_text(script, "script.py").settings["data.train_on"] == "assistant"


def test_llama_factorys_columns_are_taken(import_text: Importer, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(
        '{"asked": {"file_name": "a.json", "columns": {"prompt": "q", "response": "r"}, "subset": "main"},'
        ' "plain": {"file_name": "p.json", "columns": {"prompt": "words"}}}'
    )
    base = f"stage: sft\nmodel_name_or_path: a/b\ndataset_dir: {tmp_path}\n"
    asked = import_text(f"{base}dataset: asked\n")
    assert asked.settings["data.columns"] == {"instruction": "q", "output": "r"}
    assert asked.settings["data.format"] == "alpaca"
    assert "subset of asked is not taken" in note_of(asked, "dataset")
    plain = import_text(f"{base}dataset: plain\n").settings
    assert (plain["data.format"], plain["data.columns"]) == ("text", {"text": "words"})


def test_bitsandbytes_keeps_plain_scales_unless_a_script_asks(import_text: Importer) -> None:
    text = "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')\nSFTConfig(seed=1)\n"
    assert import_text(text, "a.py").settings["quantization.double_quant"] is False


def test_arguments_of_transformers_train_all_tokens_too(import_text: Importer) -> None:
    made = import_text("SFTTrainer(args=TrainingArguments('out'))\n", "a.py")
    assert made.settings["data.train_on"] == "all"
    assert "training.gradient_checkpointing" not in made.settings
    assert made.settings["training.learning_rate"] == 5e-5


def test_trls_loss_on_completions_alone_is_told_of(import_text: Importer) -> None:
    made = import_text("dataset_name: a/b\nuse_peft: true\nmodel_name_or_path: c/d\n")
    assert "the completion alone" in note_of(made, "assistant_only_loss")


def test_unsloth_writes_its_own_defaults_over_trls(import_text: Importer) -> None:
    loaded = "m = FastLanguageModel.from_pretrained('a/b')\n"
    own = import_text(f"{loaded}SFTTrainer(args=SFTConfig(output_dir='out'))\n", "a.py").settings
    expected = {"learning_rate": 5e-5, "gradient_accumulation_steps": 2, "warmup_ratio": 0.1, "weight_decay": 0.001}
    assert {name: own[f"training.{name}"] for name in expected} == expected
    assert (own["training.optim"], own["training.seed"]) == ("adamw_8bit", 3407)
    theirs = import_text(f"{loaded}SFTTrainer(args=TrainingArguments('out'))\n", "a.py").settings
    assert theirs["training.per_device_train_batch_size"] == 8
    assert "training.weight_decay" not in theirs


def test_what_a_script_computes_is_not_replaced_by_a_habit(import_text: Importer) -> None:
    made = import_text("BitsAndBytesConfig(load_in_4bit=asked())\nSFTConfig(seed=1)\n", "a.py")
    assert "quantization.weight_format" not in made.settings


ODD: tuple[object, ...] = (
    float("nan"),
    float("inf"),
    10**400,
    -1,
    "",
    "1e999",
    "\0",
    "~nobody",
    "x" * 5000,
    True,
    [],
    [[]],
    {},
    {"path": 1},
)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
@pytest.mark.parametrize("value", [*ODD, [None, 3, {"path": {}}]], ids=lambda value: repr(value)[:20])
def test_an_odd_value_ends_no_rule(tool: Tool, value: object) -> None:
    around = {"grad_accumulation_steps": 2, "lr_schedule.name": "cosine_decay", "optimizer_config": value}
    for key in tool.keys:
        assert key.rule(value, Given({**around, key.names[0]: value}, {}, {"num_hidden_layers": 4})).note is not None


@pytest.mark.parametrize("path", ["~nobody/x", "a\0b", "x" * 5000])
def test_a_base_that_can_be_no_path_is_a_name(tmp_path: Path, path: str, import_text: Importer) -> None:
    made = import_text(json.dumps({"model": path, "iters": 1, "data": path}), "theirs.json")
    assert made.settings["model.name_or_path"] == path


def notebook(*cells: str) -> str:
    return json.dumps({"cells": [{"cell_type": "code", "source": cell} for cell in cells]})


def test_a_cell_with_shell_lines_of_any_kind_is_read(import_text: Importer) -> None:
    shell = "here = !pwd\n!pip install a \\\n    b\n%time\nif True:\n    !ls\nSFTConfig?\n"
    made = import_text(notebook("%%bash\npip install (", f"{shell}SFTConfig(seed=3)\n"), "note.ipynb")
    assert made.settings["training.seed"] == 3


def test_a_cell_that_says_something_and_cannot_be_read_is_refused(import_text: Importer) -> None:
    with pytest.raises(ConfigError) as caught:
        import_text(notebook("SFTConfig(seed=1)", "!ls\nLoraConfig(r=4) (("), "note.ipynb")
    assert caught.value.code == "QH-U03"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n" * 200_000, "characters of code"),
        ("SFTConfig(seed=1)\n" + "#" * (17 * 1024 * 1024), "more than 16777216 bytes"),
        ("x = " + "-" * 100_000 + "1\n", "nested too deeply"),
    ],
    ids=["code", "bytes", "depth"],
)
def test_a_script_without_end_is_refused_at_once(import_text: Importer, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        import_text(text, "script.py")
    assert caught.value.code == "QH-U03"


def test_a_value_that_is_not_understood_is_not_called_off(import_text: Importer) -> None:
    made = import_text("base_model: a/b\nadapter: lora\nval_set_size: many\ntorch_dtype: float8\n")
    assert "no share of the rows" in note_of(made, "val_set_size")
    assert "float8 is not offered" in note_of(made, "torch_dtype")
