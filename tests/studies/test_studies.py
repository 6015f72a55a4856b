"""studies/: networks that are what they say, data that are checked, runs that are whole or absent."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import adaptbatch as ab
from adaptbatch.reporting.history import COLUMNS as HISTORY
from studies import __main__ as commands
from studies import data
from studies.__main__ import app
from studies.engine import analysis, schema, training
from studies.engine.arms import Arm, Warmup
from studies.engine.networks import Autoencoder, ResidualLayer, fit_width
from studies.engine.runner import Run, run_all
from studies.engine.training import Task, evaluate, shuffled_passes, train
from studies.questions import overhead, quick
from studies.questions.overhead import accuracy, contenders, profile
from tests.processes import CONTEXT, start

ROOT = Path(__file__).parents[2]
TINY = Task(
    data="mnist", examples=640, micro_batch=32, probe_examples=50, probe_every=200, depth=8, widths=(16, 8), code=4
)


class TestNetworks:
    def test_eighty_weight_layers_from_input_to_output(self):
        net = Autoencoder(depth=80, widths=(128, 32), code=16)
        linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
        assert len(linear) == 80
        hidden = [layer for layer in net.modules() if isinstance(layer, ResidualLayer)]
        assert len(hidden) == 76
        assert net.loss(torch.rand(3, 784)).isfinite()

    def test_the_taper_falls_to_the_code_and_mirrors(self):
        net = Autoencoder(depth=40, widths=(128, 32), code=16)
        down = [layer.linear.out_features for layer in net.encoder]
        up = [layer.linear.out_features for layer in net.decoder]
        assert down == sorted(down, reverse=True)
        assert up == sorted(up)
        assert (net.encode_in.out_features, down[-1], net.from_code.out_features, up[-1]) == (128, 32, 32, 128)
        assert [layer.linear.in_features for layer in net.decoder] == down[::-1]

    @pytest.mark.parametrize(("fan_in", "fan_out"), [(6, 6), (6, 4), (4, 6)])
    @pytest.mark.parametrize(("residual", "scale"), [("identity", 1.0), ("scaled", 0.25), ("rezero", 0.3)])
    def test_each_layer_is_literally_the_skip_plus_its_branch(self, residual, scale, fan_in, fan_out):
        layer = ResidualLayer(fan_in, fan_out, residual, "none", num_residual=16)
        if residual == "rezero":
            assert layer.scale.item() == 0.0
            nn.init.constant_(layer.scale, scale)
        h = torch.randn(5, fan_in)
        skip = h[:, :fan_out] if fan_out <= fan_in else torch.cat([h, torch.zeros(5, fan_out - fan_in)], dim=1)
        expected = skip + scale * nn.functional.leaky_relu(layer.linear(h), 0.2)
        torch.testing.assert_close(layer(h), expected)
        assert torch.equal(fit_width(h, fan_out), skip)

    def test_no_skip_is_the_branch_alone(self):
        layer, h = ResidualLayer(6, 4, "none", "none", num_residual=1), torch.randn(5, 6)
        assert torch.equal(layer(h), layer.branch(h))

    @pytest.mark.parametrize(
        ("norm", "side"), [("pre", "input"), ("branch", "output"), ("heads", None), ("none", None)]
    )
    def test_norms_stand_where_they_say(self, norm, side):
        layer, h = ResidualLayer(6, 6, "identity", norm, num_residual=1), 3 + 5 * torch.randn(5, 6)
        given = nn.functional.layer_norm(h, (6,)) if side == "input" else h
        out = nn.functional.leaky_relu(layer.linear(given), 0.2)
        expected = nn.functional.layer_norm(out, (6,)) if side == "output" else out
        torch.testing.assert_close(layer.branch(h), expected)

    @pytest.mark.parametrize("norm", ["none", "pre", "branch", "heads"])
    def test_what_the_code_is_read_from_is_normalised(self, norm):
        net, x = Autoencoder(depth=8, widths=(16, 8), code=4, norm=norm), torch.rand(5, 784)
        h = net.encoder(net.encode_in(x))
        read = h if norm == "none" else nn.functional.layer_norm(h, (8,))
        torch.testing.assert_close(net.encode(x), net.to_code(read))
        z = torch.randn(5, 4)
        torch.testing.assert_close(net.decode(z), net.decode_out(net.decoder(net.from_code(z))))

    def test_variational_loss_is_squared_error_plus_divergence(self):
        torch.manual_seed(0)
        net, x = Autoencoder(depth=8, widths=(16, 8), code=4), torch.rand(5, 784)
        mean, log_var = net.encode(x).chunk(2, dim=-1)
        noise = torch.empty_like(mean).normal_(generator=torch.Generator().manual_seed(1))
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mean, (log_var / 2).exp()), normal(0.0, 1.0)).sum(-1)
        error = (net.decode(mean + (log_var / 2).exp() * noise) - x).square().sum(-1)
        found = net.example_losses(x, torch.Generator().manual_seed(1))
        torch.testing.assert_close(found, error + kl)
        torch.testing.assert_close(net.loss(x, torch.Generator().manual_seed(1)), found.mean())

    def test_an_autoencoder_has_no_noise(self):
        net, x = Autoencoder(depth=8, widths=(16, 8), code=4, variational=False), torch.rand(5, 784)
        assert torch.equal(net.loss(x), net.loss(x))
        assert net.to_code.out_features == 4

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"depth": 7}, r"depth must be even and at least 6 .* got depth = 7"),
            ({"depth": 4}, r"got depth = 4"),
            ({"residual": "dense"}, r"residual must be one of .* got residual = 'dense'"),
            ({"norm": "batch"}, r"norm must be one of .* got norm = 'batch'"),
        ],
    )
    def test_refuses(self, change, message):
        with pytest.raises(ValueError, match=message):
            Autoencoder(**({"widths": (16, 8), "code": 4} | change))


class TestData:
    def test_mnist_is_whole(self):
        mnist = data.load("mnist")
        assert mnist.train_inputs.shape == (60_000, 784)
        assert mnist.test_inputs.shape == (10_000, 784)
        assert mnist.train_inputs.dtype == np.float32
        # The constants known for this data set: mean, standard deviation, labels of the first images, class counts.
        assert mnist.train_inputs.mean(dtype=np.float64) == pytest.approx(0.13066, abs=1e-5)
        assert mnist.train_inputs.std(dtype=np.float64) == pytest.approx(0.30811, abs=1e-5)
        assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert np.bincount(mnist.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

    def test_a_corrupt_file_is_refused_with_the_way_out(self, tmp_path):
        whole = (data.FOLDER / "mnist.idx.xz").read_bytes()
        (tmp_path / "mnist.idx.xz").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(data.DataError, match=r"has SHA-256 .*, expected 7f5adce4.*restore it with `git checkout"):
            data.load("mnist", tmp_path)

    def test_a_missing_file_is_refused_with_the_way_out(self, tmp_path):
        with pytest.raises(data.DataError, match=r"mnist\.idx\.xz is missing, .*restore it with `git checkout"):
            data.load("mnist", tmp_path)

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(ValueError, match=r"name must be one of \['digits', .*\], got name = 'imagenet'"):
            data.load("imagenet")


class TestTraining:
    def test_passes_are_shuffled_whole_and_end_at_the_budget(self):
        inputs = torch.arange(10.0)[:, None]
        task = replace(TINY, examples=25, micro_batch=4)
        batches = list(shuffled_passes(inputs, task, seed=0))
        assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4, 1]
        first, second = torch.cat(batches[:3]).ravel(), torch.cat(batches[3:6]).ravel()
        assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
        assert first.tolist() != second.tolist()
        assert all(map(torch.equal, batches, shuffled_passes(inputs, task, seed=0)))

    def test_losses_are_kept_in_blocks_and_in_order(self):
        """A tensor for each loss of a long run let its memory grow without end."""
        losses = training._Losses("cpu", block=4)
        for value in range(10):
            losses.append(torch.tensor(float(value), requires_grad=True) * 2)
        assert losses.values().tolist() == [2.0 * value for value in range(10)]
        assert [len(block) for block in losses._blocks] == [4, 4, 4]
        assert not any(block.requires_grad for block in losses._blocks)

    def test_a_run_is_a_table_of_the_schema(self):
        seen: list[float] = []
        arm = Arm("adaptive", ab.RelativeStandardError(), lr=1e-3, schedule=Warmup(320))
        table = train(TINY, arm, seed=0, study="tiny", report=seen.append)
        assert {name: str(kind) for name, kind in table.dtypes.items()} == schema.COLUMNS
        assert table["examples_seen"].iloc[-1] == TINY.examples == seen[-1]
        assert table["validation_loss"].notna().sum() == 4
        assert table["validation_loss"].dropna().iloc[-1] < table["validation_loss"].dropna().iloc[0]
        assert table["lr"].tolist() == pytest.approx([1e-3 * min(n / 320, 1) for n in table["examples_seen"]])
        assert table["at_limit"].iloc[0]
        assert (table["micro_batch_loss_max"] >= table["loss"]).all()

    def test_arms_share_weights_data_and_codes(self):
        """Fixed(4) at micro-batch 32 and Fixed(2) at 64 see the same first batch from the same start."""
        a = train(TINY, Arm("a", ab.Fixed(4), lr=1e-3), seed=3, study="tiny")
        b = train(replace(TINY, micro_batch=64), Arm("b", ab.Fixed(2), lr=1e-3), seed=3, study="tiny")
        assert a["loss"].iloc[0] == pytest.approx(b["loss"].iloc[0], rel=1e-5)

    def test_the_probe_is_the_same_at_every_call(self):
        net, probe = Autoencoder(depth=8, widths=(16, 8), code=4), torch.rand(5, 784)
        assert evaluate(net, probe) == evaluate(net, probe)

    def test_the_history_columns_are_the_controllers(self):
        assert schema.HISTORY_COLUMNS == HISTORY
        with pytest.raises(ValueError, match=r"got unknown \['surplus'\] and missing \['accumulation_steps', 'arm'"):
            schema.conform(pd.DataFrame({"surplus": [1.0]}))


class TestRunner:
    def runs(self, **changes) -> list[Run]:
        arms = (Arm("small", ab.Fixed(2), lr=1e-3), Arm("large", ab.Fixed(5), lr=1e-3))
        return [Run("tiny", replace(TINY, **changes), arm, seed=0) for arm in arms]

    def test_finished_runs_are_kept_and_changed_ones_run_again(self, tmp_path):
        first = run_all(self.runs(), tmp_path, workers=1)
        paths = [run.path(tmp_path) for run in self.runs()]
        stamps = [path.stat().st_mtime_ns for path in paths]
        again = run_all(self.runs(), tmp_path, workers=1)
        assert [path.stat().st_mtime_ns for path in paths] == stamps
        pd.testing.assert_frame_equal(first, again)
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "results.parquet"), first)
        paths[1].unlink()
        run_all(self.runs(), tmp_path, workers=1)
        assert paths[0].stat().st_mtime_ns == stamps[0]
        changed = run_all(self.runs(examples=320), tmp_path, workers=1)
        assert changed["examples_seen"].max() == 320

    @pytest.mark.xdist_group("pool")
    def test_two_processes_train_what_one_does(self, tmp_path):
        one, two = (run_all(self.runs(), tmp_path / str(workers), workers) for workers in (1, 2))
        times = [name for name in one if "seconds" in name]
        pd.testing.assert_frame_equal(two.drop(columns=times), one.drop(columns=times))

    def test_a_studys_table_alone_is_enough_to_resume(self, tmp_path):
        first = run_all(self.runs(), tmp_path, workers=1)
        for run in self.runs():
            run.path(tmp_path).unlink()
        again = run_all(self.runs(), tmp_path, workers=1)
        assert not any(run.path(tmp_path).exists() for run in self.runs())
        pd.testing.assert_frame_equal(first, again)
        assert again.attrs == first.attrs

    def test_the_table_says_where_it_comes_from(self, tmp_path):
        run = self.runs()[0]
        run.execute(tmp_path)
        attrs = run.stored(tmp_path).attrs
        assert attrs["identity"]["arm"]["rule"] == "Fixed(accumulation_steps=2)"
        assert attrs["identity"]["data_sha256"] == data.SOURCES["mnist"].sha256
        assert attrs["provenance"]["torch"] == torch.__version__
        json.dumps(attrs)

    def test_a_run_that_is_killed_leaves_no_table(self, tmp_path, monkeypatch):
        def killed(*args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        run = self.runs()[0]
        with pytest.raises(KeyboardInterrupt):
            run.execute(tmp_path)
        assert run.stored(tmp_path) is None


class TestAnalysis:
    def test_spikes_against_the_definition_spelled_out(self):
        rng = np.random.default_rng(0)
        losses = rng.lognormal(sigma=0.6, size=600)
        losses[300] = np.nan
        flags = analysis.spike_flags(pd.Series(losses))
        for i in range(len(losses)):
            before = losses[max(0, i - 100) : i]
            before = before[~np.isnan(before)]
            spike = i >= 60 and not losses[i] <= 2.0 * np.median(before)
            assert flags[i] == spike
        assert 5 < flags.sum() < 200

    def test_summary_of_two_runs(self):
        arm = Arm("adaptive", ab.RelativeStandardError(), lr=1e-3)
        table = train(TINY, arm, seed=0, study="tiny")
        both = pd.concat([table, table.assign(arm="other")], ignore_index=True)
        rows = analysis.summary(both)
        assert rows["arm"].tolist() == ["adaptive", "other"]
        row = rows.iloc[0]
        assert row["updates"] == table["optimizer_step"].max()
        assert row["examples"] == TINY.examples
        assert row["final"] == table["validation_loss"].dropna().iloc[-1]
        assert row["best"] <= row["final"]


class TestCommands:
    @pytest.mark.timeout(240)
    def test_quick_writes_one_table_and_one_figure_and_resumes(self, tmp_path, capsys, monkeypatch):
        command = ["quick", "--examples", "400", "--out", str(tmp_path), "--workers", "1"]
        app.cli(args=command)
        first = capsys.readouterr().out
        for name in ("fixed 64", "fixed 192", "fixed 384", "adaptive", "spikes", "limits", "results.parquet"):
            assert name in first
        assert (tmp_path / "figure.png").stat().st_size > 20_000
        assert "no plan: history must have at least 8 windows with a measurement of their own" in first
        results = pd.read_parquet(tmp_path / "results.parquet")
        assert list(results.columns) == list(schema.COLUMNS)
        assert results["arm"].nunique() == 4
        # It has been drawn.
        monkeypatch.setattr(commands, "quick_figure", lambda *_, **__: None)
        app.cli(args=command)
        assert capsys.readouterr().out.count("(stored)") == 4
        # Committed results have the one table and not the runs' own.
        shutil.rmtree(tmp_path / "runs")
        app.cli(args=[*command, "--fresh"])
        assert "(stored)" not in capsys.readouterr().out

    def test_the_quick_arms_are_what_their_names_say(self):
        sizes = {arm.name: getattr(arm.rule, "accumulation_steps", 0) * size for arm, size in quick.arms()}
        assert sizes == {"adaptive": 0, "fixed 64": 64, "fixed 192": 192, "fixed 384": 384}
        assert all(isinstance(run.arm.rule, ab.rules.Rule) for run in quick.runs())


def test_estimates_equal_the_exact_covariance():
    """On a real network: bias within 4 standard errors and 3 %, for equal and unequal micro-batches."""
    table = accuracy.measure(windows=1000, seed=0)
    assert (table["bias in SE"].abs() < 4).all()
    assert (table["bias %"].abs() < 3).all()
    # The test has the power to see a 3 % bias: its standard error is half of that at most.
    assert (table["bias %"] / table["bias in SE"]).max() < 1.5


def test_ours_does_the_work_of_the_hand_written_loop(monkeypatch):
    """What is timed is the same step: after a window the parameters are equal to the last bit."""
    monkeypatch.setattr(contenders, "STEPS", 2)
    start, x = Autoencoder(depth=8, widths=(16, 8), code=4, variational=False), torch.rand(8, 784)
    ends = []
    for name in ("hand-written loop", "adaptbatch", "adaptbatch, one window in four"):
        net = Autoencoder(depth=8, widths=(16, 8), code=4, variational=False)
        net.load_state_dict(start.state_dict())
        contenders.available()[name].make(net)(list(x.split(4)))
        ends.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    assert all(torch.equal(end, ends[0]) for end in ends)
    assert not torch.equal(ends[0], torch.cat([p.detach().reshape(-1) for p in start.parameters()]))


def test_ratios_are_taken_within_a_round():
    seconds = pd.DataFrame(
        {
            "round": [0, 0, 1, 1, 2, 2],
            "contender": ["hand-written loop", "ours"] * 3,
            "seconds": [1.0, 1.1, 10.0, 11.0, 2.0, 2.2],
        }
    )
    table = overhead.ratios(seconds).set_index("contender")
    assert table.loc["ours", "ratio"] == pytest.approx(1.1)
    assert table.loc["hand-written loop", "ratio"] == 1.0


@pytest.mark.parametrize("setting", [name for name in contenders.SETTINGS if name != "80 layers"])
def test_every_network_has_its_loop_and_ours(setting):
    own = [one for one in contenders.CONTENDERS.values() if one.setting == setting]
    net = contenders.SETTINGS[setting].network()
    assert net.loss(contenders.SETTINGS[setting].micro_batches()[0][:2]).isfinite()
    assert [one.windows for one in own] == [1, 1, contenders.EVERY]
    assert {one.baseline for one in own} == {f"loop, {setting}"}


def test_a_profile_is_all_of_a_window_each_second_once(monkeypatch):
    """What is called counts for itself, not for its caller; what no part has belongs to the loop."""
    now = [0.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    clock = profile.Clock("loop")
    inner = clock.timed("inner", spend)
    outer = clock.timed("outer", lambda: (spend(1.0), inner(10.0), inner(20.0), spend(2.0)))
    spend(100.0)
    outer()
    assert clock.take() == {"loop": 100.0, "outer": 3.0, "inner": 30.0}


def test_a_profile_has_every_part_and_leaves_no_clock():
    before = {(owner, name): getattr(owner, name) for parts in profile.PARTS.values() for owner, name in parts}
    table = profile.measure(2, networks=("one parameter, k = 8",))
    assert {(owner, name): getattr(owner, name) for owner, name in before} == before
    for _, own in table.groupby(["network", "measured"]):
        assert own["part"].tolist() == list(profile.PARTS)
        assert own["us"].ne(0.0).all()


def _study(folder: str, open_while_it_runs: Connection) -> None:
    """``python -m studies quick`` in this process; what it starts holds the connection, too."""
    # As on the command line; else the study's own process would have to import all that this one's server has.
    multiprocessing.set_start_method("fork", force=True)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        app.cli(args=["quick", "--examples", "2000", "--out", folder, "--workers", "1"])


def _wait_until_gone(ended: Connection) -> None:
    """No process of the study outlives it, killed or not."""
    assert ended.poll(120.0), "the study's processes go on"
    with pytest.raises(EOFError):
        ended.recv()


class TestKilled:
    def test_what_was_done_is_kept_and_nothing_is_half_written(self, tmp_path):
        """kill -9 at random moments; what a killed process leaves is whole, and is not computed again."""
        moments, done, kills = random.Random(0), {}, 0
        for attempt in range(12):
            ended, held = CONTEXT.Pipe(duplex=False)
            before = set(tmp_path.glob("runs/*"))
            process = start(_study, str(tmp_path), held)
            held.close()
            # Some progress each time, then any moment.
            while process.is_alive() and before == set(tmp_path.glob("runs/*")):
                time.sleep(0.01)
            process.join(moments.uniform(0.0, 1.0) if attempt < 3 else None)
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
            _wait_until_gone(ended)
            present = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("runs/*.parquet"))}
            assert done.items() <= present.items()
            assert all(len(pd.read_parquet(path)) > 0 for path in present)
            done = present
            if process.exitcode == 0:
                break
        assert process.exitcode == 0
        assert kills == 3
        assert len(done) == 4
        assert all(run.stored(tmp_path) is not None for run in quick.runs(0, 2000))


class TestRanks:
    def test_torchrun_trains_every_run_on_all_ranks(self, tmp_path):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        command = [sys.executable, *launcher, "-m", "studies", "quick", "--examples", "336", "--out", str(tmp_path)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, timeout=500)
        table = pd.read_parquet(tmp_path / "results.parquet")
        assert set(table["arm"]) == {run.arm.name for run in quick.runs()}
        fixed = table[table["arm"] == "fixed 192"]
        assert fixed["global_batch"].tolist() == [192.0, 144.0]
        adaptive = table[table["arm"] == "adaptive"]
        # One micro-batch of 16, half on each rank, is evidence.
        assert adaptive["global_batch"].iloc[0] == 16.0
        assert adaptive["noise_trace"].notna().all()
        assert {run["identity"]["world_size"] for run in table.attrs["runs"]} == {2}
        assert all(run.stored(tmp_path) is None for run in quick.runs(0, 336))
