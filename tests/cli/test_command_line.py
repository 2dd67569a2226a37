"""The command line as a user meets it: what it accepts, what it refuses and how, and what a run leaves behind."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from rlhf_lit.__main__ import COMMANDS
from rlhf_lit.trainer.progress import LiveProgress, PlainProgress, progress_bar

ROOT = Path(__file__).parents[2]
OVERLAYS = ROOT / "configs" / "overlays"
SHIPPED = {path for path in ROOT.glob("configs/*/*.yaml") if path.parent.name not in ("overlays", "evaluate")}


class StopAt(Callback):
    """Ends training in a given way once a step is done."""

    def __init__(self, step: int, how: str = "error") -> None:
        self.step = step
        self.how = how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt if self.how == "interrupt" else RuntimeError("the power went out")


def brevity(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A reward function: the shorter, the better."""
    return [-float(len(response)) for response in responses]


def metrics(run_folder: str) -> list[dict[str, str]]:
    with open(Path(run_folder, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def weights(run_folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(run_folder, "checkpoints", "last.ckpt"), weights_only=True)["state_dict"]


# --- the front door --------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from rlhf_lit.__main__ import main; s = main(['--help']); heavy = {'torch', 'yaml', 'lightning'}"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code + "; sys.exit(s or len(heavy & set(sys.modules)))"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    for name, (line, _) in COMMANDS.items():
        assert sum(row.split()[:1] == [name] and line in row for row in answer.stdout.splitlines()) == 1


def test_no_command_shows_help(run):
    answer = run()
    assert (answer.status, answer.err) == (0, "")
    assert "usage: rlhf-lit" in answer.out


def test_an_unknown_command(run):
    answer = run("fti")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == "error: no command 'fti': did you mean 'fit'?\n"


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = [
    # unknown keys, in a file
    ("foo: 1", [], "foo: unknown key"),
    ("foo: {}", [], "foo: unknown key, in extra.yaml"),
    ("foo: {bar: {}}", [], "foo: unknown key, in extra.yaml"),
    ("foo: null", [], "foo: unknown key"),
    ("trainer: {foo: 1}", [], "trainer.foo: unknown key"),
    ("trainer: {foo: {}}", [], "trainer.foo: unknown key"),
    ("model: {init_args: {foo: 1}}", [], "model.foo: unknown key; DPO has base, loss"),
    ("model: {init_args: {foo: {}}}", [], "model.foo: unknown key"),
    ("model: {init_args: {base: {foo: {}}}}", [], "model.base.foo: unknown key"),
    ("model: {init_args: {base: {lora: {rnk: 4}}}}", [], "model.base.lora.rnk: unknown key; LoRA has rank, alpha"),
    ("model: {init_args: {loss: {init_args: {bta: 1}}}}", [], "model.loss.bta: unknown key; DPOLoss has beta"),
    ("model: {init_arg: {learning_rate: 1}}", [], "model.init_arg.learning_rate: unknown key"),
    ("data: {init_args: {train: {pth: x}}}", [], "data.train.pth: unknown key"),
    # unknown keys, on the command line
    ("", ["--foo=1"], "foo: unknown key"),
    ("", ["--trainer.foo=1"], "trainer.foo: unknown key"),
    ("", ["--trainer.max_epoch=1"], "trainer.max_epoch: unknown key"),
    ("", ["--model.foo=1"], "model.foo: unknown key"),
    ("", ["--model.foo={}"], "model.foo: unknown key"),
    ("", ["--model.base.foo=1"], "model.base.foo: unknown key"),
    ("", ["--data.foo=1"], "data.foo: unknown key"),
    ("", ["--checkpoint.foo=1"], "checkpoint.foo: unknown key"),
    ("", ["stray"], "stray"),
    # types and values
    ("", ["--trainer.max_epochs=lots"], "trainer.max_epochs: expected int or null, got 'lots'"),
    ("", ["--model.learning_rate=lots"], "model.learning_rate: expected float, got 'lots'"),
    ("", ["--model.base.lora.rank=lots"], "model.base.lora.rank: expected int, got 'lots'"),
    ("model: {init_args: {base: {lora: 3}}}", [], "model.base.lora: expected the fields of LoRA or null, got '3'"),
    ("", ["--model.optimizer.name=sgd"], "model.optimizer.name: expected one of 'adamw', 'adamw_8bit'"),
    ("", ["--seed_everything=x"], "seed_everything: expected bool or int, got 'x'"),
    ("", ["--data.batch_size=0"], "data.batch_size must be at least 1, not 0"),
    ("", ["--model.base.lora.dropout=0.1"], "DPO runs without dropout"),
    # classes
    ("", ["--model=Foo"], "model: there is no class named 'Foo'"),
    ("model: {class_path: Foo}", [], "model: there is no class named 'Foo'"),
    ("", ["--model.loss=Foo"], "model.loss: there is no class named 'Foo'"),
    ("", ["--data=Foo"], "data: there is no class named 'Foo'"),
    ("", ["--model=no.such.Module"], "No module named 'no'"),
    # files
    ("[1", [], "--config extra.yaml, line 2: not YAML"),
    ("just words", [], "--config extra.yaml: expected keys and values (such as 'model:'), found a str"),
    ("# nothing", [], "--config extra.yaml: expected keys and values (such as 'model:'), found nothing"),
    (
        "",
        ["--config", "nope.yaml"],
        "--config nope.yaml: no such file, and none of that name is shipped; `rlhf-lit configs` lists",
    ),
    ("", ["--data.train.path=nope.jsonl"], "nope.jsonl"),
    ("", ["--model.base.name=runs/nope"], "runs/nope: no such model folder"),
    # the trainer
    ("", ["--trainer.strategy=foo"], "invalid strategy name: `strategy='foo'`"),
    ("", ["--trainer.accelerator=foo"], "invalid accelerator name: `accelerator='foo'`"),
    ("", ["--trainer.devices=-3"], "trainer: `devices`"),
    ("", ["--trainer.precision=bf16-true"], "trainer.precision bf16-true: it would round"),
    ("", ["--trainer.precision=16-mixed"], "use bf16-mixed"),
    ("", ["--trainer.gradient_clip_val=1"], "model.optimizer.max_grad_norm"),
    ("", ["--trainer.accumulate_grad_batches=2"], "data.micro_batch_tokens"),
    ("", ["--trainer.default_root_dir=x"], "set runs and name"),
    ("", ["--trainer.val_check_interval=1000"], "`val_check_interval` (1000)"),
    # checkpoints and run names
    ("", ["--ckpt_path=nope.ckpt"], "--ckpt_path nope.ckpt: no such checkpoint"),
    ("", ["--ckpt_path=dpo.yaml"], "--ckpt_path dpo.yaml: not a checkpoint, or cut short"),
    ("", ["--ckpt_path=last"], "--ckpt_path last: no run under runs/dpo has a checkpoint"),
    ("", ["--name=../x"], "name: '../x' is no run name"),
    ("", ["--runs=dpo.yaml"], "cannot make a run folder in dpo.yaml/dpo"),
]


@pytest.mark.parametrize(("extra", "argv", "complaint"), REFUSED, ids=[f"{e}{' '.join(a)}" for e, a, _ in REFUSED])
def test_bad_input_ends_with_one_line(run, place, extra, argv, complaint):
    if extra:
        (place / "extra.yaml").write_text(extra + "\n")
        argv = ["--config", "extra.yaml", *argv]
    answer = run("fit", "--config", "dpo.yaml", *argv)
    assert answer.status == 2
    lines = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert "Traceback" not in answer.err
    assert "usage:" not in answer.err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--data=SFTDataModule"], "model: required, and not set"),
        (["--model=DPO", "--data=PreferenceDataModule", "--model.base.name=tiny"], "model.loss: required"),
        (["--config"], "expected one argument"),
    ],
)
def test_what_is_missing_is_named(run, argv, complaint):
    answer = run("fit", *argv)
    assert answer.status == 2
    assert complaint in answer.err
    assert answer.err.count("\n") == 1


def test_vllm_where_it_cannot_run(run):
    answer = run("fit", "--config", "ppo.yaml", "--config", OVERLAYS / "vllm.yaml")
    found = importlib.util.find_spec("vllm")
    reason = "vLLM samples on a GPU" if found else "vLLM is not installed: pip install 'rlhf-lit[vllm]', or leave"
    assert answer.status == 2
    lines = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert f"error: model.vllm: {reason}" in lines[0]
    assert "Traceback" not in answer.err


def test_a_refused_trainer_leaves_no_run_behind(run, place):
    assert run("fit", "--config", "dpo.yaml", "--trainer.strategy=foo").status == 2
    assert not list(place.glob("runs/*/*"))


def test_a_checkpoint_of_another_shape(run, place):
    (place / "runs").mkdir()
    torch.save({"pytorch-lightning_version": "2.6.0", "no": "loops"}, place / "other.ckpt")
    answer = run("fit", "--config", "sft.yaml", "--ckpt_path=other.ckpt")
    assert answer.status == 2
    assert "error: --ckpt_path other.ckpt: not a checkpoint of this model" in answer.err.replace(str(place) + "/", "")


def test_a_bug_shows_its_traceback(run):
    with pytest.raises(RuntimeError, match="the power went out"):
        run("fit", "--config", "sft.yaml", "--trainer.callbacks=test_command_line.StopAt", "--trainer.callbacks.step=1")


def test_an_interrupt_ends_with_one_line_and_no_model(run, place):
    before = signal.getsignal(signal.SIGINT)
    try:
        answer = run(
            "fit", "--config", "sft.yaml",
            "--trainer.callbacks=test_command_line.StopAt", "--trainer.callbacks.step=1",
            "--trainer.callbacks.how=interrupt",
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert answer.status == 130
    assert answer.err.splitlines()[-1] == "interrupted"
    assert not (place / "runs/sft/version_0/hf").exists()


# --- what is accepted ------------------------------------------------------------------------------------------------


def resolved(run, *argv: object) -> dict:
    answer = run("fit", *argv, "--print_config")
    assert answer.status == 0, answer.err
    return yaml.safe_load(answer.out)


@pytest.mark.parametrize("config", ["sft", "dpo", "reward", "ppo"])
@pytest.mark.parametrize("overlay", sorted(path.stem for path in OVERLAYS.glob("*.yaml")))
def test_every_overlay_fits_every_algorithm(run, config, overlay):
    if overlay == "vllm" and config != "ppo":
        pytest.skip("for algorithms that learn from their own samples")
    plain = resolved(run, "--config", f"{config}.yaml")
    laid_over = resolved(run, "--config", f"{config}.yaml", "--config", OVERLAYS / f"{overlay}.yaml")
    assert laid_over["model"]["class_path"] == plain["model"]["class_path"]
    assert laid_over["model"]["init_args"]["base"]["name"] == "tiny"
    assert laid_over != plain
    if "lora" in overlay:
        assert laid_over["model"]["init_args"]["base"]["lora"]["rank"] == 16


@pytest.mark.parametrize("path", sorted(SHIPPED), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_parses(run, path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)  # as from the repository's root
    config = resolved(run, "--config", path)
    assert config["model"]["class_path"].startswith("rlhf_lit.algorithms.")
    assert config["data"]["class_path"].startswith("rlhf_lit.data.")


def test_overlays_choose_no_class_of_ours():
    for path in OVERLAYS.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        assert "class_path" not in str({key: content.get(key) for key in ("model", "data")}), path.name


def test_short_overrides_after_the_configs_win(run):
    config = resolved(
        run, "--config", "dpo.yaml", "--config", OVERLAYS / "lora.yaml",
        "--model.base.lora.rank=8", "--model.loss.beta=0.3", "--data.batch_size=4", "--trainer.max_epochs", "5",
    )  # fmt: skip
    arguments = config["model"]["init_args"]
    assert arguments["base"]["lora"] | {"rank": 8, "alpha": 32.0} == arguments["base"]["lora"]
    assert arguments["base"]["name"] == "tiny"
    assert arguments["loss"]["init_args"]["beta"] == 0.3
    assert config["data"]["init_args"]["batch_size"] == 4
    assert config["data"]["init_args"]["train"]["path"] == "pairs.jsonl"
    assert config["trainer"]["max_epochs"] == 5


def test_a_value_lost_to_another_class_is_named(run):
    answer = run(
        "fit", "--config", "dpo.yaml", "--model.loss.label_smoothing=0.1", "--model.loss=IPOLoss",
        "--trainer.fast_dev_run=true",
    )  # fmt: skip
    assert answer.status == 0
    assert "note: model.loss.label_smoothing: '0.1' of the command line is not used" in answer.err


def test_a_length_that_nobody_named_is_said(run, place):
    """Once, in our words; episodes name one."""
    said = "note: neither trainer.max_epochs nor trainer.max_steps is set: the run has 1000 epochs, unless it is ended"
    unset, ending = "--trainer.max_epochs=null", "--trainer.callbacks=EarlyStopping"
    soon = ("--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.divergence_threshold=0")
    answer = run("fit", "--config", "sft.yaml", unset, ending, *soon, "--preflight=false")
    assert answer.status == 0, answer.err
    assert [line for line in answer.err.splitlines() if "1000" in line] == [f"{said} before"]
    answer = run("fit", "--config", "ppo.yaml", unset, "--data.episodes=8", "--preflight=false")
    assert answer.status == 0, answer.err
    assert "1000" not in answer.err


def test_a_reward_function_is_found_in_the_working_folder(run, place, monkeypatch):
    (place / "my_rewards.py").write_text("def score(prompts, responses, rows):\n    return [0.0 for _ in responses]\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(place))])
    config = resolved(run, "--config", "ppo.yaml", "--model.reward.function=my_rewards.score")
    assert config["model"]["init_args"]["reward"]["init_args"]["function"] == "my_rewards.score"


def test_users_trainer_values_win(run):
    config = resolved(run, "--config", "sft.yaml", "--trainer.num_sanity_val_steps=2", "--trainer.inference_mode=true")
    assert config["trainer"]["num_sanity_val_steps"] == 2
    assert config["trainer"]["inference_mode"] is True


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_folder_holds_the_whole_record(run, place):
    from transformers import AutoModelForCausalLM

    answer = run("fit", "--config", "sft.yaml", "--name=first/sft")
    assert answer.status == 0
    folder = place / "runs/first/sft/version_0"
    assert answer.out.splitlines()[-1].startswith(f"run {folder.relative_to(place)} · model ")
    assert "val/loss" in answer.out.splitlines()[-1]
    assert any(line.startswith("epoch 1 · step 8/8 · val/loss ") for line in answer.out.splitlines())

    rows = metrics(folder)
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == list(range(8))
    assert sum(bool(row["val/loss"]) for row in rows) == 2
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {4, 8}
    assert all(isinstance(s["prompt"], str) and isinstance(s["response"], str) for s in samples)
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__
    assert versions["hardware"]["cpus"] == os.cpu_count()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step_0000008.ckpt"}

    exported = AutoModelForCausalLM.from_pretrained(folder / "hf").state_dict()
    saved = {name: tensor for name, tensor in weights(folder).items() if "embed_tokens" in name}
    assert len(saved) == 1
    assert torch.equal(exported["model.embed_tokens.weight"], next(iter(saved.values())))

    again = resolved(run, "--config", folder / "config.yaml")
    assert again == yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("ci", "terminal", "kind"),
    [("", True, LiveProgress), ("", False, PlainProgress), ("true", True, PlainProgress), ("0", True, LiveProgress)],
)
def test_the_bar_is_for_terminals_alone(monkeypatch, ci, terminal, kind):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert type(progress_bar()) is kind


def test_a_later_stage_starts_from_an_earlier_run(run, place):
    assert run("fit", "--config", "sft.yaml", "--trainer.max_epochs=1").status == 0
    assert run("fit", "--config", "dpo.yaml", "--model.base.name=runs/sft").status == 0
    first = next(row for row in metrics("runs/dpo/version_0") if row["train/loss"])
    assert float(first["train/loss"]) == pytest.approx(0.6931472, abs=1e-6)


def test_each_run_has_a_folder_of_its_own(run, place):
    for _ in range(2):
        assert run("fit", "--config", "sft.yaml", "--config", OVERLAYS / "debug.yaml").status == 0
    assert {path.name for path in (place / "runs/sft").iterdir()} == {"version_0", "version_1"}
    assert len([row for row in metrics("runs/sft/version_1") if row["train/loss"]]) == 2


def test_evaluation_and_prediction(run, place):
    assert run("fit", "--config", "sft.yaml", "--trainer.max_epochs=1").status == 0
    for command in ("validate", "test"):
        answer = run(command, "--config", "sft.yaml", "--data.test.path=sft.jsonl", "--ckpt_path=last")
        assert answer.status == 0, answer.err
    fitted = next(float(row["val/loss"]) for row in metrics("runs/sft/version_0") if row["val/loss"])
    validated = next(float(row["val/loss"]) for row in metrics("runs/sft/version_1") if row["val/loss"])
    assert validated == pytest.approx(fitted, rel=1e-6)

    answer = run("predict", "--config", "sft.yaml", "--ckpt_path=last", "--data.predict.path=sft.jsonl")
    assert answer.status == 0, answer.err
    rows = [json.loads(line) for line in Path("runs/sft/version_3/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    assert all(isinstance(row["response"], str) for row in rows)
    assert "32 predictions in runs/sft/version_3/predictions.jsonl" in answer.out


def test_evaluation_without_a_checkpoint_takes_the_base_as_it_is(run, place):
    assert run("validate", "--config", "dpo.yaml").status == 0
    (row,) = [row for row in metrics("runs/dpo/version_0") if row["val/loss"]]
    assert float(row["val/loss"]) == pytest.approx(0.6931472, abs=1e-6)


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_continues_in_its_folder(run, place):
    saving = ["--config", "sft.yaml", "--checkpoint.every_n_train_steps=3"]
    assert run("fit", *saving, "--name=whole").status == 0
    stop = ["--trainer.callbacks=test_command_line.StopAt", "--trainer.callbacks.step=5"]
    with pytest.raises(RuntimeError):
        run("fit", *saving, "--name=broken", *stop)
    folder = place / "runs/broken/version_0"
    assert not (folder / "hf").exists()
    assert [int(row["step"]) for row in metrics(folder) if row["train/loss"]][-1] >= 3
    with (folder / "metrics.csv").open("a") as file:
        file.write("0,7")  # a row that a kill cut short

    answer = run("fit", *saving, "--name=broken", "--ckpt_path=last")
    assert answer.status == 0, answer.err
    assert [path.name for path in (place / "runs/broken").iterdir()] == ["version_0"]
    assert (folder / "config_resumed_1.yaml").is_file()
    assert (folder / "hf/config.json").is_file()

    resumed, whole = weights(folder), weights(place / "runs/whole/version_0")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    columns = ("step", "epoch", "train/loss", "train/grad_norm", "val/loss")
    assert [[row[c] for c in columns] for row in metrics(folder)] == [
        [row[c] for c in columns] for row in metrics(place / "runs/whole/version_0")
    ]
    assert Path(folder, "samples.jsonl").read_text() == Path("runs/whole/version_0/samples.jsonl").read_text()

    assert run("fit", *saving, "--name=broken", "--ckpt_path=last", "--trainer.max_epochs=3").status == 0
    assert (folder / "config_resumed_2.yaml").is_file()
    assert [int(row["step"]) for row in metrics(folder) if row["train/loss"]] == list(range(12))


def test_another_checkpoint_starts_a_new_folder(run, place):
    assert run("fit", "--config", "sft.yaml", "--trainer.max_epochs=1").status == 0
    before = Path("runs/sft/version_0/metrics.csv").read_text()
    answer = run("fit", "--config", "sft.yaml", "--ckpt_path=runs/sft/version_0/checkpoints/last.ckpt")
    assert answer.status == 0, answer.err
    assert Path("runs/sft/version_0/metrics.csv").read_text() == before
    assert [int(row["step"]) for row in metrics("runs/sft/version_1") if row["train/loss"]] == [4, 5, 6, 7]


def test_a_checkpoint_changes_no_value_that_the_user_set(run, place):
    assert run("fit", "--config", "dpo.yaml").status == 0
    path = Path("runs/dpo/version_0/checkpoints/last.ckpt").resolve()
    checkpoint = torch.load(path, weights_only=True)
    assert "hyper_parameters" not in checkpoint
    # What Lightning's command line would merge over the user's values.
    checkpoint["hyper_parameters"] = {
        "_class_path": "rlhf_lit.algorithms.DPO",
        "loss": {"class_path": "DPOLoss", "init_args": {"beta": 0.1}},
    }
    torch.save(checkpoint, path)
    assert run("validate", "--config", "dpo.yaml", f"--ckpt_path={path}", "--model.loss.beta=0.7").status == 0
    config = yaml.safe_load(Path("runs/dpo/version_1/config.yaml").read_text())
    assert config["model"]["init_args"]["loss"]["init_args"]["beta"] == 0.7
    trained = [float(row["val/margin"]) for row in metrics("runs/dpo/version_0") if row["val/margin"]][-1]
    (validated,) = [float(row["val/margin"]) for row in metrics("runs/dpo/version_1") if row["val/margin"]]
    assert validated == pytest.approx(7 * trained, rel=1e-4)


# --- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield monkeypatch
    import wandb

    wandb.teardown()


SHORT = ["--config", "sft.yaml", "--config", OVERLAYS / "wandb.yaml", "--config", OVERLAYS / "debug.yaml"]


def offline_log(folder: Path) -> Path:
    import wandb

    wandb.teardown()  # as at the end of a process: its service closes the file
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return log


@pytest.mark.parametrize("offline", [True, False])
def test_wandb_without_an_account_records_offline(run, place, no_wandb_account, offline):
    answer = run("fit", *SHORT, f"--trainer.logger.offline={offline}".lower())
    assert answer.status == 0, answer.err
    assert ("no API key" in answer.err) is not offline
    assert "gave up" not in answer.err
    folder = place / "runs/sft/version_0"
    recorded = offline_log(folder).read_bytes()
    assert b"val/loss" in recorded
    assert b"samples" in recorded
    assert b"learning_rate" in recorded, "the resolved config"
    assert len([row for row in metrics(folder) if row["train/loss"]]) == 2


def test_an_unreachable_wandb_does_not_end_the_run(run, place, no_wandb_account):
    no_wandb_account.setenv("WANDB_API_KEY", "0" * 40)
    no_wandb_account.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    no_wandb_account.setattr("rlhf_lit.trainer.loggers.INIT_TIMEOUT", 3.0)
    answer = run("fit", *SHORT)
    assert answer.status == 0, answer.err
    assert answer.err.count("warning: W&B is not reachable") == 1
    assert offline_log(place / "runs/sft/version_0").is_file()


def test_a_wandb_that_breaks_in_the_middle_does_not_end_the_run(run, place, no_wandb_account):
    import wandb

    def broken(*args, **kwargs):
        raise wandb.errors.CommError("the service is gone")

    no_wandb_account.setattr(wandb.Run, "log", broken)
    answer = run("fit", *SHORT, "--trainer.logger.offline=true")
    assert answer.status == 0, answer.err
    assert answer.err.count("warning: W&B gave up (the service is gone)") == 1
    assert len([row for row in metrics("runs/sft/version_0") if row["train/loss"]]) == 2
