"""Studies of many runs: data that are found and checked, arms that are what they say, runs that are done once."""

from __future__ import annotations

import gzip
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from sklearn.metrics import roc_auc_score

import adaptbatch as ab
import studies
from studies import data, questions
from studies.__main__ import app
from studies.engine import reduce, sweep
from studies.engine.arms import OPTIMIZERS, Arm, Constant, Follow, Warmup
from studies.engine.language import NextCharacter
from studies.engine.networks import Autoencoder
from studies.engine.results import ResultsError, read_table, write_atomically
from studies.engine.runner import Run
from studies.engine.sweep import Found, Options, Study, Where, carry_out, collect
from studies.engine.training import Task, score, train
from studies.engine.tuning import Range, Search, beside, carried, together, trials
from studies.questions import catalogue, comparison, depth, live, origin, planning, transformer
from studies.questions.overhead.accuracy import exact_moments, network_and_examples

STUDIES = catalogue()
ROOT = Path(__file__).parents[2]
TINY = Task("digits", 320, 32, probe_examples=40, probe_every=64, depth=8, widths=(16, 8), code=4, anomaly=0)


class TestData:
    @pytest.mark.parametrize(("name", "anomaly"), [("mnist", 1), ("digits", 3), ("shuttle", 1)])
    def test_no_anomaly_is_trained_on_or_validated(self, name, anomaly):
        whole, parts = data.load(name), data.split(name, anomaly)
        labels = np.concatenate([whole.train_labels, whole.test_labels])
        assert len(parts.train) == (whole.train_labels != anomaly).sum()
        assert len(parts.validation) == (whole.test_labels != anomaly).sum()
        assert (~parts.anomalous).sum() == len(parts.validation)
        assert parts.anomalous.sum() <= (labels == anomaly).sum()
        share = parts.anomalous.mean()
        assert share == pytest.approx(0.35, abs=0.001) or parts.anomalous.sum() == (labels == anomaly).sum()
        # Rows of the test set by their sums: the normal ones are the validation set's, in another order.
        assert np.sort(parts.test[~parts.anomalous].sum(axis=1)) == pytest.approx(
            np.sort(parts.validation.sum(axis=1)), rel=1e-6
        )

    def test_shuttle_is_the_published_one(self):
        shuttle = data.load("shuttle")
        labels = np.concatenate([shuttle.train_labels, shuttle.test_labels])
        assert (len(labels), int(labels.sum()), shuttle.train_inputs.shape[1]) == (49_097, 3_511, 9)
        assert np.abs(shuttle.train_inputs).max() <= 5.0

    def test_a_file_is_found_where_the_user_keeps_it_zipped_or_not(self, tmp_path, monkeypatch):
        raw = (data.FOLDER / "shuttle.csv.gz").read_bytes()
        monkeypatch.setattr(data, "FOLDER", tmp_path / "empty")
        monkeypatch.setenv("ADAPTBATCH_DATA", str(tmp_path))
        with pytest.raises(data.DataError, match=r"shuttle\.csv\.gz is missing, looked in \d folders; restore it"):
            data.load.__wrapped__("shuttle")
        (tmp_path / "shuttle").mkdir()
        (tmp_path / "shuttle" / "shuttle.csv.gz.gz").write_bytes(gzip.compress(raw))
        assert len(data.load.__wrapped__("shuttle").train_labels) == 39_277

    def test_what_is_not_whole_is_refused(self, tmp_path):
        raw = (data.FOLDER / "shuttle.csv.gz").read_bytes()
        (tmp_path / "shuttle.csv.gz.gz").write_bytes(gzip.compress(raw)[:-9])
        with pytest.raises(data.DataError, match="is not whole"):
            data.load("shuttle", tmp_path)

    def test_nothing_is_downloaded_unasked(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "FOLDER", tmp_path)
        monkeypatch.setattr(data, "_cache", lambda: tmp_path / "cache")
        monkeypatch.setattr("pooch.retrieve", lambda *_, **__: pytest.fail("downloaded"))
        source = replace(data.SOURCES["fashion"], folders=())
        monkeypatch.setitem(data.SOURCES, "fashion", source)
        with pytest.raises(data.DataError, match=r"python -m studies fetch fashion.*apt-get install"):
            data.load.__wrapped__("fashion")

    def test_what_is_fetched_is_verified(self, tmp_path, monkeypatch):
        content = b"a file"
        file = data.File("x", "0" * 64, "https://example.org/x.gz")

        def arrives(url: str, *, known_hash: None, fname: str, path: Path) -> None:
            path.mkdir(parents=True)
            (path / fname).write_bytes(gzip.compress(content))

        monkeypatch.setattr("pooch.retrieve", arrives)
        monkeypatch.setattr(data, "_cache", lambda: tmp_path)
        monkeypatch.setitem(data.SOURCES, "x", replace(data.SOURCES["fashion"], files=(file,), folders=()))
        with pytest.raises(data.DataError, match=r"x\.gz has SHA-256 .*, expected 0000"):
            data.fetch("x")

    def test_an_unknown_class_is_refused(self):
        with pytest.raises(ValueError, match=r"anomaly must be one of the labels \[0, 1\] of shuttle, got anomaly = 7"):
            data.split("shuttle", 7)


class TestArms:
    def test_schedules_are_in_examples(self):
        assert [Warmup(100.0).factor(seen) for seen in (10, 100, 1000)] == [0.1, 1.0, 1.0]
        follow = Follow((64.0, 320.0, 576.0), (64.0, 256.0, 256.0), reference=64.0)
        assert [follow.factor(seen) for seen in (1, 64, 65, 320, 9999)] == [1.0, 1.0, 0.5, 0.5, 0.5]
        assert replace(follow, power=1.0).factor(100) == 0.25
        assert Constant().factor(5) == 1.0

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_every_optimizer_trains_with_its_rate(self, name):
        arm = Arm("a", ab.Fixed(2), lr=1e-3, optimizer=name, schedule=Warmup(160))
        table = train(replace(TINY, examples=192), arm, seed=0, study="s")
        assert table["lr"].tolist() == pytest.approx([1e-3 * min(seen / 160, 1) for seen in table["examples_seen"]])

    def test_an_unknown_optimizer_is_refused(self):
        with pytest.raises(ValueError, match=r"optimizer must be one of \['adam', .*\], got optimizer = 'lion'"):
            Arm("a", ab.Fixed(1), lr=1.0, optimizer="lion").build_optimizer([torch.zeros(1, requires_grad=True)])

    def test_clipping_clips_what_is_applied(self):
        table = train(TINY, Arm("a", ab.Fixed(2), lr=1e-3, clip=1.0), seed=0, study="s")
        assert (table["batch_grad_norm"] > 1.0).all()
        assert table["applied_grad_norm"].to_numpy() == pytest.approx(1.0, rel=1e-4)

    def test_an_arm_may_bring_its_own_network(self):
        arm = Arm("a", ab.Fixed(1), lr=1.0, residual="rezero", norm="branch")
        layer = TINY.network(arm, 64).encoder[0]
        assert (layer.norm, isinstance(layer.scale, torch.nn.Parameter)) == ("branch", True)


class TestTraining:
    def test_what_diverges_breaks_off_and_says_so(self):
        table = train(TINY, Arm("a", ab.Fixed(1), lr=1e30, optimizer="sgd"), seed=0, study="s")
        assert table["examples_seen"].iloc[-1] < TINY.examples
        found = reduce.outcome(table, TINY.examples, 1.0)
        assert found["diverged"]
        assert found["final"] == math.inf

    def test_the_score_is_the_area_under_the_curve(self):
        torch.manual_seed(0)
        model, parts = Autoencoder(8, (16, 8), 4, inputs=64), data.split("digits", 0)
        with torch.no_grad():
            code = model.encode(torch.from_numpy(parts.test)).chunk(2, dim=-1)[0]
            errors = (model.decode(code) - torch.from_numpy(parts.test)).square().sum(-1).numpy()
        found = score(model, parts)
        assert found["auroc"] == pytest.approx(roc_auc_score(parts.anomalous, errors))
        assert math.isnan(score(model, data.split("digits", None))["auroc"])


class TestReduce:
    def table(self, losses: list[float], **columns: object) -> pd.DataFrame:
        count = len(losses)
        blank = {"loss": 1.0, "spikes": 0, "skipped": False, "at_limit": False, "global_batch": 10.0}
        blank |= {"accumulation_steps": 1, "wall_seconds": 1.0, "examples_seen": 10.0 * np.arange(1, count + 1)}
        return pd.DataFrame(blank | {"validation_loss": losses} | columns)

    def outcome(self, losses: list[float], **columns: object) -> dict[str, object]:
        return reduce.outcome(self.table(losses, **columns), 10.0 * len(losses), mean_input_loss=50.0)

    def test_final_is_the_mean_of_the_last_tenth(self):
        assert self.outcome([100.0] * 18 + [4.0, 6.0])["final"] == 5.0

    @pytest.mark.parametrize(
        ("late", "diverged"),
        [([30.0] * 20, False), ([30.0] * 10 + [2000.0] * 10, True), ([49.0] * 20, False), ([5.0, 60.0] * 10, True)],
        ids=["fine", "lost", "collapsed", "often lost"],
    )
    def test_diverged_is_lost_what_was_had(self, late, diverged):
        assert self.outcome([90.0] * 4 + [20.0] * 6 + late)["diverged"] is diverged

    def test_a_slow_start_is_no_divergence(self):
        assert not self.outcome(np.geomspace(6e3, 100, 40).tolist())["diverged"]

    def test_probe_spikes_against_the_definition(self):
        losses = [10.0] * 30 + [13.1] + [10.0] * 5 + [12.9] + [math.inf] + [10.0] * 2
        assert self.outcome(losses)["probe_spikes"] == 2

    def test_the_curve_keeps_the_mean_loss_between_evaluations(self):
        columns = {name: 1.0 for name in reduce.CURVE if name not in ("reason", "optimizer_step")}
        table = self.table([math.nan, 8.0, math.nan, math.nan, 6.0], loss=[1.0, 2.0, 3.0, 4.0, 5.0])
        table = table.assign(**{k: v for k, v in columns.items() if k not in table}, reason="hold", optimizer_step=1)
        found = reduce.curve(table)
        assert found["loss"].tolist() == [1.5, 4.0]
        assert found["validation_loss"].tolist() == [8.0, 6.0]

    def test_a_schedule_unrolls_to_the_steps(self):
        k = [2, 2, 3, 3, 3, 2, 8]
        found = reduce.schedule(pd.DataFrame({"accumulation_steps": k}))
        assert np.repeat(found["k"], found["windows"]).tolist() == k


class TestTuning:
    def test_trials_are_the_same_in_every_process_and_stay_in_their_range(self):
        space = {"lr": Range(1e-4, 1e-1), "knob": Range(2.0, 32.0)}
        points = trials(space, 16)
        assert points == trials(space, 16)
        assert points[:4] == trials(space, 4)
        for name, bound in space.items():
            values = np.log([point[name] for point in points])
            assert (values >= math.log(bound.low)).all()
            assert (values <= math.log(bound.high)).all()
            # Quasi-random: no quarter of the range is left out.
            quarters = np.histogram(values, 4, (math.log(bound.low), math.log(bound.high)))[0]
            assert (quarters >= 2).all()


def study(arms: list[Arm], stages: bool = False) -> Study:
    """A study of tiny runs; the second arm can be named when the first is finished."""

    def plan(options: Options, found: Found) -> list[Run]:
        runs = [Run(sweep.SHARED, TINY, arm, 0, (("stage", arm.name),)) for arm in arms]
        return runs if not stages or runs[0] in found else runs[:1]

    return Study("tiny", "two arms", plan, lambda folder: {})


ARMS = [Arm("adaptive", ab.RelativeStandardError(), lr=1e-3), Arm("fixed", ab.Fixed(3), lr=1e-3)]


@pytest.mark.usefixtures("nothing_committed")
class TestSweep:
    def test_a_plan_is_asked_again_until_nothing_is_missing(self, tmp_path):
        runs, curves = carry_out(study(ARMS, stages=True), Options(), Where(1), tmp_path / "out", tmp_path / "store")
        assert runs["stage"].tolist() == ["adaptive", "fixed"]
        assert set(curves["key"]) == set(runs["key"])
        assert runs["final"].tolist() == pytest.approx(
            [curves[curves["key"] == key]["validation_loss"].iloc[-1] for key in runs["key"]], rel=1e-6
        )
        loaded = studies.load("tiny", folder=tmp_path / "out")
        pd.testing.assert_frame_equal(loaded[["key", "arm", "final"]], runs[["key", "arm", "final"]])
        rows = studies.load("tiny", folder=tmp_path / "out", curves=True)
        assert (
            rows["arm"].value_counts().to_dict()
            == curves["key"].map(runs.set_index("key")["arm"]).value_counts().to_dict()
        )

    def test_what_is_committed_is_not_run_again(self, tmp_path):
        runs, _ = carry_out(study(ARMS), Options(), Where(1), tmp_path, tmp_path / "store")
        found = Found(tmp_path / "elsewhere", [tmp_path / "tiny"])
        planned = study(ARMS).plan(Options(), found)
        assert all(run in found for run in planned)
        again, curves = collect(study(ARMS), Options(), found)
        pd.testing.assert_frame_equal(again, runs, check_dtype=False)
        assert found[planned[0]]["schedule_k"] is not None
        assert np.repeat(found[planned[0]]["schedule_k"], found[planned[0]]["schedule_windows"]).sum() == 10
        assert len(curves) == sum(len(found.curves[run.key]) for run in planned)

    def test_a_committed_run_may_have_no_curve(self, tmp_path):
        """It broke off before its first evaluation."""
        runs, curves = carry_out(study(ARMS), Options(), Where(1), tmp_path, tmp_path / "store")
        write_atomically(curves[curves["key"] != runs["key"].iloc[0]], tmp_path / "tiny" / "curves.parquet")
        again, left = collect(study(ARMS), Options(), Found(tmp_path / "elsewhere", [tmp_path / "tiny"]))
        assert again["key"].tolist() == runs["key"].tolist()
        assert set(left["key"]) == set(runs["key"].iloc[1:])

    def test_a_name_is_no_part_of_a_run(self):
        one = Run(sweep.SHARED, TINY, ARMS[0], 0)
        assert one.key == Run(sweep.SHARED, TINY, replace(ARMS[0], name="other"), 0, (("stage", "x"),)).key
        others = [replace(one, seed=1), replace(one, task=replace(TINY, anomaly=1)), replace(one, arm=ARMS[1])]
        others.append(replace(one, arm=replace(ARMS[0], lr=2e-3)))
        assert len({one.key, *(run.key for run in others)}) == 5

    def test_a_run_that_another_process_is_at_is_left_to_it(self, tmp_path):
        run = Run(sweep.SHARED, TINY, ARMS[1], 0)
        path = run.path(tmp_path)
        path.parent.mkdir(parents=True)
        with FileLock(path.with_suffix(".lock")):
            assert run.execute(tmp_path) is False
            with pytest.raises(RuntimeError, match=r"1 of 1 runs of tiny are not finished \(fixed, seed 0, \.\.\.\)"):
                carry_out(study(ARMS[1:]), Options(), Where(1), tmp_path / "out", tmp_path)
        assert run.execute(tmp_path) is True

    def test_submitit_runs_the_same_jobs(self, tmp_path):
        where = Where(workers=2, cluster="local", minutes=5)
        submitted, _ = carry_out(study(ARMS), Options(), where, tmp_path, tmp_path / "store")
        here, _ = carry_out(study(ARMS), Options(), Where(1), tmp_path / "here", tmp_path / "here")
        assert submitted["final"].tolist() == here["final"].tolist()

    def test_a_gpu_that_is_not_there_is_refused(self):
        assert sweep._devices("cpu", 2) == ["cpu", "cpu"]
        assert sweep._devices("cuda:1", 2) == ["cuda:1", "cuda:1"]
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="device must be 'cpu' on a machine without a GPU"):
                sweep._devices("cuda", 1)

    def test_gpus_are_taken_in_turn(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert sweep._devices("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]


class TestResults:
    @pytest.mark.parametrize("content", [b"", b"PAR1", b"not a table"], ids=["empty", "cut", "other"])
    def test_a_file_that_is_not_whole_is_refused_by_name(self, content, tmp_path):
        (tmp_path / "runs.parquet").write_bytes(content)
        with pytest.raises(ResultsError, match=r"runs\.parquet is not a whole Parquet file .*; delete it"):
            read_table(tmp_path / "runs.parquet")

    def test_half_a_table_is_refused_by_name(self, tmp_path):
        write_atomically(pd.DataFrame({"x": range(1000)}), tmp_path / "t.parquet")
        whole = (tmp_path / "t.parquet").read_bytes()
        (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ResultsError, match="is not a whole Parquet file"):
            read_table(tmp_path / "t.parquet")

    def test_a_study_without_results_is_named(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"name must be a study with results .* got name = 'nope'; there: \[\]"
        ):
            studies.load("nope", folder=tmp_path)

    def test_reading_results_needs_no_torch(self):
        modules = [
            "engine.analysis",
            "engine.provenance",
            "engine.reduce",
            "engine.schema",
            "engine.tuning",
            "questions",
        ]
        modules += ["output.channel_figure", "output.figures", "output.fronts", "output.readme", "output.verdicts"]
        named = ", ".join(f"studies.{name}" for name in modules)
        code = f"import sys, {named}; assert not {{'torch', 'adaptbatch'}} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


TOY = """
import adaptbatch as ab
from studies.engine.arms import Arm
from studies.engine.runner import Run
from studies.engine.sweep import Study, from_runs
from studies.engine.training import Task

EXAMPLES = {"smoke": 320, "laptop": 1280, "paper": 1280}


def plan(options, found):
    task = Task("digits", EXAMPLES[options.preset], 32, probe_examples=40, depth=8, widths=(16, 8), code=4)
    return [Run("toy", task, Arm(f"fixed {32 * k}", ab.Fixed(k), lr=1e-3), 0, (("stage", "final"),)) for k in (1, 2)]


def tables(runs, curves):
    return {"ends": runs[["arm", "updates"]]}


STUDY = Study("toy", "a file that was put there", plan, from_runs(tables))
"""


@pytest.fixture
def put(tmp_path, monkeypatch) -> Iterator[Callable[[str, str], None]]:
    """Puts a file among the questions."""
    place = tmp_path / "questions"
    place.mkdir()
    monkeypatch.setattr(questions, "__path__", [*questions.__path__, str(place)])
    before = set(sys.modules)
    yield lambda name, text: (place / f"{name}.py").write_text(text)
    for name in {one for one in set(sys.modules) - before if (place / f"{one.split('.')[-1]}.py").is_file()}:
        del sys.modules[name]


class TestCatalogue:
    def test_a_file_among_the_questions_is_a_study(self, put, tmp_path, capsys):
        """It is listed last, and runs, is stored and reported as all are."""
        put("toy", TOY)
        assert list(catalogue()) == [*STUDIES, "toy"]
        app.cli(args=["list"])
        assert capsys.readouterr().out.splitlines()[-1] == "toy          a file that was put there"
        where = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "--workers", "1"]
        app.cli(args=["run", "toy", "--preset", "smoke", *where])
        assert "toy: ends" in capsys.readouterr().out
        assert read_table(tmp_path / "out" / "toy" / "ends.parquet")["updates"].tolist() == [10, 5]

    def test_an_order_is_kept(self, put):
        put("toy", TOY.replace("from_runs(tables))", "from_runs(tables), order=1.5)"))
        assert list(catalogue())[:3] == ["origin", "toy", "comparison"]

    def test_a_name_is_given_once(self, put):
        """A copied file whose name was left would write over the results of the first."""
        put("toy", TOY.replace('Study("toy"', 'Study("live"'))
        with pytest.raises(ValueError, match=r"every STUDY must have a name of its own, got \['live'\]"):
            catalogue()

    def test_what_a_task_is_trained_on_can_be_asked_for(self, capsys):
        for name in {subject.data for subject in planning.subjects(Options("laptop"))}:
            app.cli(args=["status", "planning", "--data", name])
            said = "tune" if name in ("fashion", "shuttle") else "final"
            assert said in capsys.readouterr().out

    def test_a_study_that_measures_in_one_go_says_so(self, capsys):
        app.cli(args=["status", "depth"])
        assert "no run that can be named now: it measures in one go" in capsys.readouterr().out

    @pytest.mark.parametrize("command", ["run", "status", "report"])
    def test_who_asks_for_another_is_told_the_names(self, command):
        with pytest.raises(SystemExit, match=r"must be .*stud.* \(origin, comparison, .*\).*, got .*'nope'"):
            app.cli(args=[command, "nope"])


def test_rows_that_studies_share_keep_no_labels_of_the_other(tmp_path):
    """One of several kinds of runs has the columns of all; a label of its is none of the run's."""
    row = {"key": "a", "seed": 0, "task": "transformer", "batch": 512.0, "network": None, "optimizer": "adam"}
    row |= {"task_depth": math.nan, "auroc": math.nan, "task_width": 64.0, "final": math.nan}
    sweep.write(pd.DataFrame([row]), pd.DataFrame({"key": ["a"]}), tmp_path / "planning")
    assert set(Found(tmp_path / "store", [tmp_path / "planning"]).rows["a"]) == {"key", "seed", "task_width", "final"}


def test_a_row_of_the_store_is_all_of_the_run(tmp_path, put):
    """So that a new outcome is not taken for a label."""
    put("toy", TOY)
    carry_out(catalogue()["toy"], Options("smoke"), Where(1), tmp_path, tmp_path / "store")
    found = Found(tmp_path / "store")
    for run in catalogue()["toy"].plan(Options("smoke"), found):
        known = {name for name, value in found[run].items() if value == value}
        assert set(reduce.of_the_run(found[run] | {"network": "any"})) == known


def test_the_transformer_goes_on_to_all_its_budgets(tmp_path):
    """Part by part, from rows that are put there; the longer a warm-up the better, which later budgets take over."""
    found = Found(tmp_path)
    for _ in range(40):
        missing = [run for run in transformer.plan(Options("laptop", seeds=1), found) if run not in found]
        for run in missing:
            labels = dict(run.labels)
            found.rows[run.key] = {"final": 2.0 - labels["warmup"] + abs(math.log(labels["lr"] / 6e-3)), "diverged": 0}
            found.rows[run.key] |= {"schedule_k": [2, 4], "schedule_windows": [1, 1], "mean_batch": 700.0}
        if not missing:
            break
    runs = pd.DataFrame(dict(run.labels) for run in transformer.plan(Options("laptop", seeds=1), found))
    final = runs[runs["stage"] == "final"]
    assert final.groupby("order")["millions"].unique().map(set).to_dict() == {"pre": {1, 4, 16}, "post": {1}}
    fixed = final[(final["method"] == "fixed 2048") & (final["order"] == "pre")]
    assert fixed["warmup"].tolist() == pytest.approx([0.7, 0.7, 0.7])
    longer = runs[runs["millions"] == 4]
    for method in ("fixed 2048", transformer.TUNED):
        tried = longer[(longer["stage"] == "tune") & (longer["method"] == method)]
        lr = final[(final["method"] == method) & (final["millions"] == 1) & (final["order"] == "pre")]["lr"].iloc[0]
        pairs = {(row["lr"], round(row["warmup"], 3)) for row in tried.to_dict("records")}
        assert pairs == {*((rate, 0.7) for rate in (*beside(lr), lr)), (lr, 0.5)}
    own = longer[(longer["stage"] == "final") & (longer["fixed"] == 0)]
    assert set(own["method"]) == {*transformer.PRIMARY, transformer.TUNED}


@pytest.mark.parametrize("start", [0.7, 0.3, 0.0])
@pytest.mark.parametrize("share", [0.7, 0.5, 0.3, 0.1, 0.0])
def test_what_is_best_elsewhere_is_where_the_search_begins(tmp_path, start, share):
    """Warm-ups are tried while they are better; at the best of them the rates beside are tried as well."""
    found, shares = Found(tmp_path), (0.0, 0.1, 0.3, 0.5, 0.7)
    task = comparison.task("calm", "digits", comparison.SCALES["smoke"])

    def over(at: float, rates: tuple[float, ...]) -> Search:
        return Search(rates, lambda lr: [Run("toy", task, Arm("fixed", ab.Fixed(2), lr, Warmup(1.0 + at)), 0)])

    tried: dict[float, set[float]] = {}
    for _ in range(20):
        for at, search in carried((8e-3, start), over, shares, found).items():
            for run in search.planned(found):
                tried.setdefault(at, set()).add(run.arm.lr)
                off = abs(math.log(run.arm.lr / (8e-3 if at == start else 5.66e-3)))
                found.rows.setdefault(run.key, {"final": 2.0 + 0.1 * off + abs(at - share)})
    searches = carried((8e-3, start), over, shares, found)
    assert next(iter(together(searches, found))) == (8e-3 if share == start else 5.66e-3, share)
    # One beyond the best in its direction, one in the other.
    low, high = sorted((shares.index(start), shares.index(share)))
    assert set(tried) == set(shares[max(0, low - 1) : high + 2])
    assert {at for at, rates in tried.items() if len(rates) > 1} == {start, share}


def test_where_all_rates_diverge_the_search_goes_down(tmp_path):
    """Until one at which it does not: a rate of the calm network may be far too high for another."""
    found = Found(tmp_path)
    task = comparison.task("calm", "digits", comparison.SCALES["smoke"])

    def over(at: float, rates: tuple[float, ...]) -> Search:
        return Search(rates, lambda lr: [Run("toy", task, Arm("fixed", ab.Fixed(2), lr), 0)])

    for _ in range(20):
        for search in carried((8e-3, 0.0), over, (0.0,), found).values():
            for run in search.planned(found):
                lr = run.arm.lr
                found.rows[run.key] = {"final": math.inf if lr > 1e-3 else abs(math.log(lr / 6e-4))}
    ((lr, _), final), *_ = together(carried((8e-3, 0.0), over, (0.0,), found), found).items()
    assert final <= math.log(2.0) / 4


def test_a_rate_that_was_tried_is_not_tried_again_for_its_third_digit(tmp_path):
    """The best of 8e-3, 1.13e-2 and 1.6e-2 has 7.99e-3 beside it, and one at an end has one beyond."""
    task = comparison.task("calm", "digits", comparison.SCALES["smoke"])

    def candidates(best: float) -> set[float]:
        found = Found(tmp_path)
        search = Search((8e-3, 1.13e-2, 1.6e-2), lambda lr: [Run("toy", task, Arm("fixed", ab.Fixed(2), lr), 0)])
        for lr in search.rates:
            (run,) = search.runs(lr)
            found.rows[run.key] = {"final": abs(math.log(lr / best))}
        return set(search.candidates(found)) - set(search.rates)

    assert candidates(1.13e-2) == set()
    assert candidates(1.6e-2) == {2.26e-2}
    assert candidates(8e-3) == {5.66e-3}


class TestPlans:
    @pytest.mark.parametrize("preset", ["smoke", "laptop", "paper"])
    @pytest.mark.parametrize("name", STUDIES)
    def test_every_study_can_be_planned_at_every_preset(self, name, preset, tmp_path):
        runs = STUDIES[name].plan(Options(preset), Found(tmp_path))
        assert len({(run.key, run.labels) for run in runs}) == len(runs)

    def test_every_method_has_the_same_trials(self, tmp_path):
        runs = [
            run for run in comparison.plan(Options("laptop"), Found(tmp_path)) if dict(run.labels)["stage"] == "tune"
        ]
        rates: dict[tuple[str, str], list[float]] = {}
        for run in runs:
            labels = dict(run.labels)
            rates.setdefault((labels["network"], labels["method"]), []).append(run.arm.lr)
        assert len(rates) == 31
        assert len({tuple(values) for values in rates.values()}) == 1
        assert {run.seed for run in runs}.isdisjoint(range(30))

    def test_controls_repeat_what_was_recorded(self, tmp_path):
        """Of a recording with known windows: the same batches, the rates of their ratios, the same mean."""
        found, scale = Found(tmp_path), comparison.SCALES["smoke"]
        arm = Arm("adaptive", ab.RelativeStandardError(), lr=1e-2)
        recorded = comparison.labelled("final", "calm", "digits", scale, arm, 1, "adaptive")
        found.rows[recorded.key] = {"schedule_k": [2, 4, 8], "schedule_windows": [3, 2, 1], "mean_batch": 230.0}
        runs = {dict(r.labels)["method"]: r for r in comparison._controls(arm, "calm", "digits", scale, 0, 2, found)}
        k = [2, 2, 2, 4, 4, 8]
        assert runs["replay"].arm.rule == ab.rules.Replay(k)
        assert sorted(runs["random switching"].arm.rule.accumulation_steps) == sorted(k)
        assert runs["constant mean"].arm.rule == ab.Fixed(4)
        rates = runs["rate follows"].arm
        assert [rates.learning_rate(seen) for seen in (128, 385, 640, 1000)] == pytest.approx(
            [1e-2, 5e-3, 5e-3, 2.5e-3]
        )
        assert runs["rate follows root"].arm.learning_rate(1000) == pytest.approx(5e-3)
        assert all(run.seed == 0 for run in runs.values())

    def test_the_origins_rows_are_what_their_names_say(self):
        rows = origin.rows(origin.SCALES["laptop"])
        sizes = {name: getattr(arm.rule, "accumulation_steps", 0) * size for name, (arm, size) in rows.items()}
        assert sizes["VAE, 256"] == sizes["residual VAE, 256"] == 256
        assert sizes["residual VAE, 4000"] == 4000
        assert set(origin.ORIGIN) < set(rows)


@pytest.fixture
def nothing_committed(monkeypatch) -> None:
    """No run of the committed results is looked for, which takes longer than a tiny run."""
    monkeypatch.setattr(sweep, "committed", list)


@pytest.fixture(scope="module")
def depths(tmp_path_factory) -> Path:
    """The folder of the smallest depth study."""
    folder = tmp_path_factory.mktemp("depths")
    depth.measure(Options("smoke"), 1, folder)
    return folder


# One that has its runs from another's stands behind it.
TOGETHER = (("origin", "origin-live"), ("live",), ("transformer",), ("bursts",))
# Of those that need a pool of processes all run in one, with one pool.
POOL = pytest.mark.xdist_group("pool")
MANY_ARMS = ("comparison", "sensitivity", "frontier", "favourable", "momentum")


def _reported_and_drawn(name: str, folder: Path) -> None:
    study = STUDIES[name]
    for title, table in study.tables(folder).items():
        assert len(table) or title in ("growth", "claims", "opening")
    study.figures(folder)
    pictures = sorted(path.suffix for path in folder.glob("*.p[nd][gf]"))
    assert pictures[:1] == [".pdf"]
    assert all(path.stat().st_size > 5_000 for path in folder.glob("*.p[nd][gf]"))


class TestFigures:
    def test_every_study_is_drawn_here_or_beside_its_own_tests(self):
        own = {"depth", "planning"}
        assert set(STUDIES) == {name for names in TOGETHER for name in names} | set(MANY_ARMS) | own

    @pytest.mark.parametrize(
        "names", [pytest.param(one, id=one[0], marks=POOL if one == ("live",) else ()) for one in TOGETHER]
    )
    def test_a_study_draws_from_its_folder(self, names, tmp_path, monkeypatch, nothing_committed):
        """Its smallest preset, run, reported and drawn; one of them in two processes."""
        for module, small in (
            (comparison, {"examples": 640}),
            (live, {"examples": 1_000}),
            (transformer, {"million": 1_500}),
        ):
            monkeypatch.setitem(module.SCALES, "smoke", replace(module.SCALES["smoke"], **small))
        monkeypatch.setattr(origin, "choices", lambda name, scale: iter(()))
        # On a part of the books: the whole of them takes longer than a training.
        whole = NextCharacter.score
        monkeypatch.setattr(NextCharacter, "score", lambda self: whole(replace(self, test=self.test[::50])))
        workers = 2 if names == ("live",) else 1
        for name in names:
            carry_out(STUDIES[name], Options("smoke"), Where(workers), tmp_path, tmp_path / "store")
            _reported_and_drawn(name, tmp_path / name)

    @pytest.mark.parametrize("name", MANY_ARMS)
    def test_the_studies_of_many_arms_draw_from_their_rows(self, name, tmp_path):
        runs, curves = _many_arms()
        study = STUDIES[name]
        sweep.write(runs, curves, tmp_path / name)
        for title, table in study.tables(tmp_path / name).items():
            write_atomically(table, tmp_path / name / f"{title}.parquet")
        study.figures(tmp_path / name)
        assert (tmp_path / name / "figure.png").stat().st_size > 10_000
        assert (tmp_path / name / "figure.pdf").read_bytes() == _drawn_again(study, tmp_path / name)


def _drawn_again(study: Study, folder: Path) -> bytes:
    study.figures(folder)
    return (folder / "figure.pdf").read_bytes()


def _many_arms() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows as the studies have them, of made-up runs."""
    rng, rows, curves = np.random.default_rng(0), [], []
    arms = {"fixed 64": 64, "fixed 256": 256, "fixed 1024": 1024, "adaptive": 128, "warmup": 64, "replay": 128}
    arms |= {"pareto": 192}
    for network in ("noisy", "calm"):
        for stage, data_, seeds in (
            ("tune", "mnist", 3),
            ("final", "mnist", 3),
            ("away", "shuttle", 3),
            ("knob", "mnist", 2),
        ):
            for arm, n in arms.items():
                for seed in range(seeds):
                    key, final = f"{network} {stage} {arm} {seed}", 30.0 + n / 50 + rng.uniform()
                    row = {"key": key, "network": network, "stage": stage, "data": data_, "arm": arm, "seed": seed}
                    row |= {
                        "method": arm,
                        "trial": seed,
                        "lr": 10.0 ** (seed - 4),
                        "final": final,
                        "diverged": n == 256,
                    }
                    row |= {"spikes": 1, "probe_spikes": 0, "mean_batch": n, "auroc": 0.5, "auprc": 0.5, "batch": n}
                    row |= {"momentum": arm == "warmup", "examples": n * 50, "updates": 50}
                    if stage == "knob":
                        row |= {"knob": "theta" if n > 100 else "warmup length", "value": float(n)}
                    rows.append(row)
                    step = np.arange(1.0, 51.0)
                    losses = 25 + (final - 25) * np.exp(3 - 3 * step / 50)
                    curve = {
                        "key": key,
                        "global_batch": n,
                        "noise_scale": step,
                        "optimizer_step": step,
                        "examples_seen": n * step,
                        "wall_seconds": step,
                    }
                    curves.append(pd.DataFrame(curve | {"validation_loss": losses}))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


class TestDepth:
    def test_moments_by_vmap_equal_those_one_by_one(self):
        small, images = network_and_examples()
        model = depth._Losses(depth=8, widths=(32, 16), code=8, residual="scaled", variational=False)
        model.load_state_dict(small.state_dict())
        found, truth = depth.exact(model, images[:50]), exact_moments(small, images[:50])
        assert found["noise_trace"] == pytest.approx(truth["noise_trace"], rel=1e-4)
        assert found["grad_sq_norm"] == pytest.approx(truth["grad_sq_norm"], rel=1e-4)

    def test_growth_finds_a_known_power(self):
        rows = [
            {
                "architecture": "a",
                "updates": 0,
                "depth": d,
                "noise_trace": 3.0 * d**2,
                "grad_sq_norm": d,
                "noise_scale": 3.0 * d,
            }
            for d in (6, 10, 20, 40, 80)
        ]
        table = depth.growth(pd.DataFrame(rows)).set_index("quantity")
        assert table["power"].to_dict() == pytest.approx({"noise_trace": 2.0, "grad_sq_norm": 1.0, "noise_scale": 1.0})

    def test_its_claims_follow_from_the_powers(self):
        rows = [
            {"architecture": "residual", "updates": 0, "quantity": name, "power": power, "low": low, "high": high}
            for name, power, low, high in (("noise_trace", 5.0, 4.0, 6.0), ("noise_scale", 0.1, 0.0, 0.2))
        ]
        assert depth.claims(pd.DataFrame(rows))["verdict"].tolist() == ["supported", "not supported"]

    def test_it_draws_from_its_folder(self, depths):
        _reported_and_drawn("depth", depths)

    def test_the_estimates_agree_with_the_exact_moments(self, depths):
        table = read_table(depths / "noise.parquet")
        smooth = table[table["architecture"].isin(["plain", "scaled", "rezero"])]
        errors = np.array(list(depth.checks(smooth)))
        # 24 figures of ten windows each: t of 9 degrees of freedom, with 1 % for the whole.
        assert np.abs(errors).max() < 6.0
