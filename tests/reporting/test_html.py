"""The page about runs: what is in it, that nothing breaks out of it, and that it works in a real browser."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch

import adaptbatch as ab
from adaptbatch.reporting import curves
from adaptbatch.reporting import html as page
from adaptbatch.reporting.history import COLUMNS, History
from studies.engine.results import RESULTS

NASTY = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


def trained(rule: ab.rules.Rule, examples: int = 4096) -> History:
    """A small regression whose batch moves."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(examples, 4), torch.randn(examples, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    model = torch.nn.Linear(4, 1)
    with ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.05), rule=rule) as controller:
        for x, y in controller.micro_batches(loader):
            controller.backward(torch.nn.functional.mse_loss(model(x), y), weight=len(x))
            if controller.step_due:
                controller.step()
    return controller.history


def made_up(windows: int) -> pd.DataFrame:
    """A run of any length, with an unbounded interval, a lost signal and a spike."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"examples_seen": 64.0 * np.arange(1, windows + 1)})
    frame["accumulation_steps"] = np.where(np.arange(windows) < windows // 2, 2, 4)
    frame["global_batch"] = 32.0 * frame["accumulation_steps"]
    frame["reason"] = np.where(np.arange(windows) == windows // 2 - 1, "grow", "hold")
    frame["loss"] = 1.0 + rng.uniform(size=windows)
    frame.loc[windows // 3, "loss"] = 77.0
    frame["noise_scale"] = 100.0 + rng.uniform(size=windows)
    frame["noise_scale_low"], frame["noise_scale_high"] = 50.0, 300.0
    frame.loc[frame.index % 7 == 0, "noise_scale_high"] = math.inf
    frame.loc[0, ["noise_scale", "noise_scale_low", "noise_scale_high"]] = math.nan
    frame.loc[1, "noise_scale"] = math.inf
    return frame


class TestContent:
    def test_every_source_gives_the_same_page(self, tmp_path):
        history = trained(ab.RelativeStandardError())
        history.to_parquet(tmp_path / "run.parquet")
        texts = [
            ab.report({"run": source}, tmp_path / f"{index}.html").read_text()
            for index, source in enumerate((history, history.to_pandas(), tmp_path / "run.parquet"))
        ]
        assert texts[0] == texts[1] == texts[2]
        assert history.to_html(tmp_path / "own.html").read_text() == texts[0]

    def test_the_decisions_are_the_changes(self):
        frame = made_up(100)
        rows, count = page.decisions({"a": frame})
        assert rows["examples"].tolist() == [64.0, 50 * 64.0, 51 * 64.0]
        assert rows["reason"].tolist() == ["hold", "grow", "hold"]
        assert rows["k"].tolist() == [2, 2, 4]
        assert count == 3

    def test_of_too_many_decisions_the_moves_stay(self):
        frame = made_up(20_000)
        frame["reason"] = np.where(frame.index % 2, "hold", "undecided")
        frame.loc[15_000:, "accumulation_steps"] = 8
        rows, count = page.decisions({"a": frame})
        assert (len(rows), count) == (page.MOVES, 20_000)
        assert {10_001 * 64.0, 15_001 * 64.0} <= set(rows["examples"])
        assert rows["examples"].is_monotonic_increasing

    def test_the_summary_is_of_the_run(self):
        frame = made_up(100)
        row = page.summary_row(frame)
        assert row["best loss"] == frame["loss"].min()
        assert row["final loss"] == pytest.approx(frame["loss"].tail(5).mean())
        assert (row["windows"], row["largest k"], row["k, first to last"]) == (100, 4, "2 to 4")
        assert row["reasons"] == "hold 99%, grow 1%"

    def test_long_names_stay_different(self, tmp_path):
        names = ["the same beginning of forty letters or more, a", "the same beginning of forty letters or more, b"]
        text = ab.report(dict.fromkeys(names, made_up(9)), tmp_path / "page.html", shown=names[:1]).read_text()
        assert all(f"{index}: the same beginning of forty " in text for index in (1, 2))
        assert "legendonly" in text

    def test_a_long_run_is_thinned_and_keeps_its_extremes(self, tmp_path):
        frame = made_up(100_000)
        text = ab.report(frame, tmp_path / "long.html").read_text()
        assert "thinned" in text
        assert len(text) < 7_000_000
        assert curves.thinned(frame, "loss")["loss"].max() == 77.0
        assert "thinned" not in ab.report(made_up(500), tmp_path / "short.html").read_text()

    def test_stretches_cover_the_run(self):
        for windows in (7, 100, 5_000):
            pieces = list(curves.segments(made_up(windows)))
            assert pieces[0][0] == 0.0
            for (start, width, reason), (following, _, other) in itertools.pairwise(pieces):
                assert start + width == pytest.approx(following)
                assert reason != other
            assert pieces[-1][0] + pieces[-1][1] == pytest.approx(64.0 * windows)

    def test_nothing_is_asked_from_elsewhere(self, tmp_path):
        text = ab.report(made_up(50), tmp_path / "page.html").read_text()
        outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
        assert re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", outside) == []

    def test_the_tables_and_pictures_are_in_it(self, tmp_path):
        picture = tmp_path / "p.png"
        picture.write_bytes(b"\x89PNG")
        claims = pd.DataFrame({"claim": ["W1"], "verdict": ["not supported"]})
        text = ab.report(
            made_up(9), tmp_path / "page.html", tables={"Claims": claims}, pictures={"A picture": picture}
        ).read_text()
        assert '<tr class="not-supported">' in text
        assert "data:image/png;base64,iVBORw==" in text

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"runs": {}}, ValueError, "runs must hold at least one run, got none"),
            (
                {"runs": 3},
                TypeError,
                "runs must be histories, DataFrames or places of Parquet or CSV files, got int for 'run'",
            ),
            ({"runs": pd.DataFrame({"loss": [1.0]})}, ValueError, r"'run' lacks \['examples_seen'"),
            ({"runs": History()}, ValueError, "runs must have at least one window, 'run' has none"),
            ({"shown": ["a"]}, ValueError, r"shown must be names of runs, got \['a'\]; there are \['run'\]"),
            ({"pictures": {"x": "x.gif"}}, ValueError, "pictures must be PNG or SVG files, got 'x.gif'"),
        ],
    )
    def test_wrong_arguments_are_named_and_nothing_is_written(self, tmp_path, change, error, message):
        arguments = {"runs": made_up(5)} | change
        with pytest.raises(error, match=message):
            ab.report(arguments.pop("runs"), tmp_path / "page.html", **arguments)
        assert not (tmp_path / "page.html").exists()

    @pytest.mark.parametrize(
        ("package", "extra"), [("plotly", "report"), ("matplotlib", "plot"), ("pyarrow", "parquet")]
    )
    def test_a_missing_package_is_named_with_its_extra(self, tmp_path, monkeypatch, package, extra):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        history = trained(ab.Fixed(2), examples=64)
        use = {
            "plotly": lambda: history.to_html(tmp_path / "x.html"),
            "matplotlib": history.plot,
            "pyarrow": lambda: history.to_parquet(tmp_path / "x.parquet"),
        }[package]
        with pytest.raises(ModuleNotFoundError, match=re.escape(f'pip install "adaptbatch[{extra}]"')):
            use()


class TestStudies:
    def test_a_study_is_one_page(self, tmp_path, capsys):
        from studies.__main__ import report

        shutil.copytree(RESULTS / "comparison", tmp_path / "comparison")
        report(("comparison",), tmp_path, tmp_path / "pages")
        text = (tmp_path / "pages" / "comparison.html").read_text()
        claims = pd.read_parquet(tmp_path / "comparison" / "claims.parquet")
        assert text.count('<tr class="supported">') == (claims["verdict"] == "supported").sum()
        pictures = len(list((RESULTS / "comparison").glob("*.png")))
        assert text.count('<img src="data:image/png;base64,') == pictures == 2
        assert "noisy, mnist, adaptive" in text
        assert "page " in capsys.readouterr().out

    def test_a_users_runs_are_one_page(self, tmp_path):
        from studies.__main__ import report

        for name in ("first", "second"):
            trained(ab.Fixed(2), examples=256).to_parquet(tmp_path / f"{name}.parquet")
        report((str(tmp_path / "first.parquet"), str(tmp_path / "second.parquet")), html=tmp_path)
        assert "<h1>first, second</h1>" in (tmp_path / "first.html").read_text()

    def test_what_is_neither_is_named(self, tmp_path):
        from studies.__main__ import report

        with pytest.raises(SystemExit, match=r"what must be studies \(origin, .*\) or files, got \['nothing'\]"):
            report(("nothing",), html=tmp_path)


class TestNotebook:
    def test_a_history_shows_itself(self):
        history = trained(ab.RelativeStandardError())
        text = history._repr_html_()
        assert f"10 of {len(history):,} windows" in text
        assert text.count("<tr>") == 1 + 1 + 1 + 10
        assert History()._repr_html_() == "<p>History of no window yet</p>"

    def test_the_plot_holds_what_the_history_holds(self):
        import matplotlib

        matplotlib.use("Agg")
        history = trained(ab.RelativeStandardError())
        rows = history.to_pandas()
        axes = history.plot()
        batch, scale = axes.get_lines()
        assert np.array_equal(batch.get_ydata(), rows["global_batch"])
        finite = np.isfinite(rows["noise_scale"])
        assert np.array_equal(np.asarray(scale.get_ydata())[finite], rows["noise_scale"][finite])
        assert history.plot(axes) is axes
        assert axes.get_yscale() == "log"
        matplotlib.pyplot.close("all")

    def test_no_window_is_refused(self):
        with pytest.raises(ValueError, match="history must have at least one window to plot"):
            History().plot()

    def test_a_run_without_evidence_can_be_drawn(self, tmp_path):
        import matplotlib

        matplotlib.use("Agg")
        history = trained(ab.Fixed(1), examples=256)
        assert history.to_pandas()["noise_scale"].isna().all()
        history.plot()
        history.to_html(tmp_path / "x.html")
        matplotlib.pyplot.close("all")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[object]:
    """A headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        if os.environ.get("ADAPTBATCH_BROWSER") == "1":
            pytest.fail("ADAPTBATCH_BROWSER=1 asks for chromium and chromedriver, which are not installed")
        pytest.skip("needs chromium and chromedriver (Debian's packages chromium and chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def requests(browser) -> list[str]:
    """Addresses asked for since the last call, but for the page itself and what is in it."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("file:", "data:", "blob:", "chrome:", "chrome-untrusted:"))]


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    frames = {"adaptive": made_up(3_000), "fixed": made_up(90), NASTY: made_up(40)}
    claims = pd.DataFrame({"claim": [NASTY], "verdict": ["undecided"]})
    place = ab.report(
        frames, tmp_path_factory.mktemp("page") / "page.html", title=NASTY, about=NASTY, tables={NASTY: claims}
    )
    browser.get_log("performance")
    browser.get(place.as_uri())
    return browser


class TestBrowser:
    def test_it_opens_without_an_error_or_a_request(self, opened):
        assert [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"] == []
        assert requests(opened) == []
        assert opened.title == NASTY

    def test_no_name_breaks_out_of_its_place(self, opened):
        assert opened.execute_script("return window.broken") is None
        assert opened.execute_script("return document.querySelectorAll('main img').length") == 0

    def test_the_plots_draw(self, opened):
        drawn = opened.execute_script(
            "return Array.from(document.querySelectorAll('#plot .scatterlayer .trace path.js-line')"
            ").filter((path) => path.getTotalLength() > 3).length"
        )
        assert drawn >= 3 * 4
        assert opened.execute_script("return document.querySelectorAll('#plot .barlayer .point path').length") > 3
        assert opened.execute_script("return document.querySelectorAll('#plot .legend .traces').length") >= 5

    def test_the_filter_filters(self, opened):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import Select

        def rows() -> list[str]:
            return opened.execute_script(
                "return Array.from(document.querySelectorAll('#decisions tbody tr')).filter((r) => r.offsetParent)"
                ".map((r) => r.textContent)"
            )

        everything = rows()
        assert len(everything) == 9
        reason, run = (Select(opened.find_element(By.ID, name)) for name in ("reason", "run"))
        reason.select_by_visible_text("grow")
        assert len(rows()) == 3
        run.select_by_visible_text("fixed")
        assert [row.startswith("fixed") for row in rows()] == [True]
        assert opened.find_element(By.ID, "count").text == "1 of 9 rows"
        reason.select_by_visible_text("all")
        run.select_by_visible_text("all")
        field = opened.find_element(By.ID, "text")
        field.send_keys("GROW")
        assert len(rows()) == 3
        field.clear()
        field.send_keys("no such text")
        assert rows() == []
        field.clear()
        field.send_keys(" ")
        field.send_keys("\b")
        assert rows() == everything

    @pytest.mark.parametrize("width", [1400, 500])
    def test_no_window_is_too_narrow(self, opened, width):
        opened.set_window_size(width, 900)
        wider = opened.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert wider <= 0
        assert opened.execute_script("return document.querySelector('#plot').clientWidth") <= width

    def test_a_history_of_a_run_opens_too(self, browser, tmp_path):
        history = trained(ab.RelativeStandardError())
        assert set(history.to_pandas()) == set(COLUMNS)
        browser.get(history.to_html(tmp_path / "run.html", title="A run").as_uri())
        assert browser.title == "A run"
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
