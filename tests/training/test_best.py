"""Early stopping and the best checkpoint: what is kept, released, continued and resumed."""

import math
from typing import get_args

import pytest

from qlora import StopTraining
from qlora.checkpoint import RunDirectory, evaluation_metrics, mode_of
from qlora.config import TrainSection
from qlora.config.sections.evaluation import ANSWER_METRICS
from qlora.errors import CheckpointError, ConfigError
from qlora.export import merge
from qlora.model import Evaluation
from qlora.objectives import objective_from_section
from qlora.proof import verify
from qlora.training import Callback, plan_run, session, train
from qlora.training.best import BestWatch, check_metric
from tests.cli import run as run_cli
from tests.training.ranks import needs_fork, train_in_two
from tests.training.same_run import assert_same_run

# Held-out loss by step: best at step 4, and again after a longer time at step 14.
LOSSES = {0: 5.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.25, 10: 2.75, 12: 1.75, 14: 1.5}
STOPPING = {
    "train__max_steps": 20, "train__eval_every": 2, "train__save_every": 5, "train__keep_checkpoints": 1,
    "train__early_stopping": {"patience": 2},
}  # fmt: skip


@pytest.fixture
def scripted(monkeypatch):
    """Give every evaluation a known loss."""

    def evaluate_examples(assembly, examples):
        # A second process alone would go on: it has to follow the first.
        step, is_first = assembly.optimizer.step_count, assembly.processes.is_first
        return Evaluation(LOSSES.get(step, 9.0) if is_first else -step, 10, 10.0, {"score": 0.5})

    monkeypatch.setattr(session, "evaluate_examples", evaluate_examples)


def checkpoints(folder):
    return [path.name for path in RunDirectory(folder).list_checkpoints()]


@pytest.mark.slow
def test_a_run_stops_early_and_its_best_checkpoint_is_released(scripted, configure, tmp_path):
    folder = tmp_path / "run"
    result = train(configure(**STOPPING))
    assert (result.status, result.steps, list(result.eval_losses)) == ("finished", 8, [0, 2, 4, 6, 8])
    assert (result.best.step, result.best.value, result.best.metric) == (4, 2.0, "eval_loss")
    assert checkpoints(folder) == ["step-000004", "step-000008"]  # the best, and the newest
    record = RunDirectory(folder).read_record()
    assert (record.best, record.stopped_early) == (result.best, 8)
    assert "Stopped early at step 8: eval_loss did not improve in the last 2 evaluations." in "\n".join(result.notes)

    again = train(configure(**STOPPING))
    assert again.trained_steps == 0
    assert again.notes[0].startswith("Already finished at step 8 (stopped early)")
    assert again.notes[1].startswith("The best is step 4, with eval_loss 2.0000")
    assert plan_run(configure(**STOPPING)).notes == again.notes

    assert merge(folder, tmp_path / "best", "float32").step == 4
    assert verify(folder, tmp_path / "best").matches
    told = run_cli("merge", folder, "-o", tmp_path / "last", "--checkpoint", "last", "--json")
    assert (told.json()["step"], told.err) == (8, "")
    told = run_cli("verify", folder, tmp_path / "last")
    assert told.code == 1
    assert "taking its best checkpoint, step 4 with eval_loss 2.0000; --checkpoint last takes step 8" in told.err
    assert "merged at step 8, but the run's adapter is that of step 4" in told.out
    assert run_cli("verify", folder, tmp_path / "last", "--checkpoint", "last").code == 0
    for which, step in (("best", 4), ("last", 8), ("4", 4), ("8", 8)):
        assert RunDirectory.open(RunDirectory(folder).choose(which)).step == step
    assert ", step 4" in run_cli("eval", folder, "--json").json()["model"]
    assert run_cli("generate", folder, "--prompt", "tin", "--max-new-tokens", "2", "--checkpoint", "best").code == 0


@pytest.mark.slow
def test_more_steps_continue_a_run_that_stopped_early_with_new_patience(scripted, configure, tmp_path):
    train(configure(**STOPPING))
    longer = STOPPING | {"train__max_steps": 24}
    assert train(configure(**longer), stop_at=9).status == "interrupted"  # patience is restored with the rest
    result = train(configure(**longer))
    assert (result.steps, result.best.step) == (18, 14)
    record = RunDirectory(tmp_path / "run").read_record()
    assert record.stopped_early == 18
    assert checkpoints(tmp_path / "run") == ["step-000014", "step-000018"]
    # Without early stopping, the run goes to its end, and its best checkpoint stays.
    result = train(configure(**longer | {"train__early_stopping": None, "train__keep_best": True}))
    assert (result.steps, result.best.step) == (24, 14)
    again = train(configure(**longer | {"train__early_stopping": None}))
    assert again.notes[0].startswith("Already finished at step 24;")


@pytest.mark.slow
def test_a_run_stopped_after_any_step_stops_early_where_the_whole_one_does(scripted, configure, tmp_path, seed):
    train(configure("whole", **STOPPING))
    for step in (1, 2 + seed % 5, 7):
        name = f"from-{step}"
        assert train(configure(name, **STOPPING), stop_at=step).status == "interrupted"
        train(configure(name, **STOPPING))
        assert_same_run(tmp_path / name, tmp_path / "whole")
        assert checkpoints(tmp_path / name) == checkpoints(tmp_path / "whole")
        records = [RunDirectory(tmp_path / each).read_record() for each in (name, "whole")]
        assert records[0].best == records[1].best
        assert records[0].stopped_early == records[1].stopped_early


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["log_evaluation", "write_record"])
def test_a_run_killed_around_an_evaluation_continues_exactly(moment, scripted, configure, tmp_path, monkeypatch):
    train(configure("whole", **STOPPING))
    owner = session.MetricsLog if moment == "log_evaluation" else RunDirectory
    original = getattr(owner, moment)

    def killed(self, *arguments):
        if moment == "log_evaluation" and arguments[0] == 8:
            raise SystemExit("killed")
        original(self, *arguments)
        if moment == "write_record" and arguments[0].best is not None:
            raise SystemExit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(owner, moment, killed)
        with pytest.raises(SystemExit):
            train(configure(**STOPPING))
    assert train(configure(**STOPPING)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole")


@pytest.mark.slow
def test_a_callback_sees_the_best_checkpoint_saved_and_may_stop_the_run(scripted, configure, tmp_path):
    class Watch(Callback):
        saved = []

        def on_save(self, step, folder):
            self.saved.append(step)
            if step == 4:
                raise StopTraining

    assert train(configure(**STOPPING), callbacks=[Watch()]).steps == 4
    assert Watch.saved == [2, 4]
    assert train(configure(**STOPPING)).steps == 8


@pytest.mark.slow
def test_a_best_checkpoint_that_could_not_be_saved_is_not_the_best(scripted, configure, tmp_path, monkeypatch):
    from qlora.training import saving

    original = saving.save_checkpoint

    def save_checkpoint(folder, *arguments, **options):
        if folder.name == "step-000004":
            raise CheckpointError("The disk is full.")
        original(folder, *arguments, **options)

    monkeypatch.setattr(saving, "save_checkpoint", save_checkpoint)
    result = train(configure(**STOPPING))
    assert (result.steps, result.best.step) == (8, 8)  # 2.25, the best of those that are saved


@pytest.mark.slow
def test_a_run_that_is_killed_after_it_was_continued_still_records_its_best(scripted, configure, tmp_path, monkeypatch):
    train(configure(**STOPPING), stop_at=5)
    with monkeypatch.context() as patched:
        patched.setattr("qlora.training.run.run_session", lambda *_: (_ for _ in ()).throw(SystemExit("killed")))
        with pytest.raises(SystemExit):
            train(configure(**STOPPING))
    run = RunDirectory(tmp_path / "run")
    assert (run.read_record().best.step, run.choose("best")) == (4, run.checkpoint(4))


@pytest.mark.slow
def test_a_best_checkpoint_that_could_not_be_recorded_is_kept_until_the_next_record(
    scripted, configure, tmp_path, monkeypatch
):
    original = RunDirectory.write_record

    def write_record(self, record):
        if record.status == "running" and record.best is not None and record.best.step == 4:
            raise CheckpointError("The disk is full.")
        original(self, record)

    monkeypatch.setattr(RunDirectory, "write_record", write_record)
    result = train(configure(**STOPPING))
    assert (result.steps, result.best.step) == (8, 4)
    assert "Step 4 is saved and the best so far, but not recorded as such. The disk is full." in "\n".join(result.notes)
    assert RunDirectory(tmp_path / "run").read_record().best == result.best


@needs_fork
@pytest.mark.slow
def test_two_processes_stop_together(scripted, configure, tmp_path):
    configure("two", **STOPPING)
    report = train_in_two(tmp_path / "two.yaml")
    assert (report["status"], report["steps"], report["best"]["step"]) == ("finished", 8, 4)
    assert checkpoints(tmp_path / "two") == ["step-000004", "step-000008"]


@pytest.mark.slow
def test_a_base_that_is_better_than_every_step_is_reported(scripted, configure, monkeypatch):
    monkeypatch.setitem(LOSSES, 0, 1.0)
    assert "The base is better: eval_loss 1.0000 before training." in train(configure(**STOPPING)).notes


def watch_of(values, **options):
    section = TrainSection(output_dir="run", **options)
    lines = [{"step": step, "eval_score": value, "eval_loss": value} for step, value in values.items()]
    return BestWatch.restored(section, lines, values.keys(), None)


def test_scores_should_rise_and_losses_fall():
    values = {0: 9.0, 1: 1.0, 2: 3.0, 3: 2.0}
    assert watch_of(values, keep_best=True).best.step == 1
    assert watch_of(values, keep_best="eval_score").best.step == 2
    assert watch_of(values).best is None


@pytest.mark.parametrize(("mode", "best"), [(None, 2), ("max", 2), ("min", 1)])
def test_a_mode_says_whether_a_metric_should_fall(mode, best):
    assert watch_of({1: 1.0, 2: 3.0, 3: 2.0}, keep_best="eval_score", best_mode=mode).best.step == best


def test_every_known_metric_has_a_mode():
    modes = {name: mode_of(f"eval_old_{name}") for name in ANSWER_METRICS}
    for objective in get_args(TrainSection.model_fields["objective"].annotation):
        section = TrainSection(output_dir="run", objective=objective)
        modes |= {
            name: mode_of(f"eval_{name}") for name in ("loss", *objective_from_section(section).loss.metric_names)
        }
    assert {name for name, mode in modes.items() if mode is None} == set()
    falling = {"loss", "reference_kl", "reward_rejected", "log_prob_rejected"}
    assert {name for name, mode in modes.items() if mode == "min"} == falling


@pytest.mark.parametrize(("metric", "unknown", "message"), [
    ("eval_perplexity", [], r"keep_best: eval_perplexity is not compared; use eval_loss"),
    ("eval_wer", ["eval_wer"], r"best_mode: is null, and whether eval_wer should fall or rise is not known"),
    ("eval_my_loss", ["eval_my_loss"], r"best_mode: is null, and whether eval_my_loss should"),
])  # fmt: skip
def test_a_metric_that_can_not_be_compared_is_refused(metric, unknown, message):
    section = TrainSection(output_dir="run", keep_best=metric)
    with pytest.raises(ConfigError, match=message):
        check_metric(section, ["eval_loss", *unknown], unknown)
    if unknown:
        check_metric(section.model_copy(update={"best_mode": "min"}), ["eval_loss", *unknown], unknown)


def test_a_metric_of_a_user_may_end_like_one_that_is_left_out():
    line = {"step": 1, "eval_loss": 1.0, "eval_perplexity": 2.7, "eval_supervised_tokens": 3, "eval_own_perplexity": 4}
    assert evaluation_metrics([line]).keys() == {"eval_loss", "eval_own_perplexity"}


def test_patience_counts_from_the_last_improvement_by_min_delta():
    def worse(values):
        return watch_of(values, early_stopping={"min_delta": 0.5, "patience": 2}).num_worse

    assert worse({1: 3.0, 2: 2.7, 3: 2.6}) == 2
    assert worse({1: 3.0, 2: 2.7, 3: 2.4}) == 0  # small steps add up
    assert watch_of({1: 3.0, 2: 2.7}, early_stopping={"min_delta": 0.5}).best.step == 2
    assert worse({1: math.nan, 2: math.inf, 3: 2.0}) == 0
    assert worse({1: math.nan, 2: math.inf}) == 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"train__keep_best": True, "data__eval": None}, "keep_best compares by eval_loss, but no rows are held out"),
    ({"train__keep_best": "old_loss"}, "keep_best compares by old_loss, but the sets are eval; set data.eval"),
    ({"train__early_stopping": {}, "train__eval_every": None}, "early_stopping compares evaluations, but eval_every"),
    ({"train__early_stopping": {}, "train__keep_best": "eval_kl"}, "has the metric eval_loss, but train.keep_best has"),
    ({"train__best_mode": "min"}, r"train\.best_mode: 'min' has no effect without train\.keep_best"),
    ({"train__early_stopping": {"patience": 0}}, r"train\.early_stopping\.patience"),
    ({"train__early_stopping": {"min_delta": -1}}, r"train\.early_stopping\.min_delta"),
])  # fmt: skip
def test_impossible_settings_are_refused(settings, message, configure):
    with pytest.raises(ConfigError, match=message):
        configure(**settings)


@pytest.mark.slow
def test_a_metric_that_is_not_evaluated_is_refused_before_the_model_is_loaded(configure, monkeypatch):
    monkeypatch.setattr("qlora.training.assemble.load_for_training", None)
    with pytest.raises(ConfigError, match=r"train\.keep_best: eval_bleu is not evaluated; the metrics are eval_loss\."):
        train(configure(train__keep_best="eval_bleu"))
