"""The record of a study and its page, from results of runs as a run leaves them."""

import html.parser
import json
import math

import pytest

from spa_jax import files
from spa_jax.errors import UserError
from spa_jax.study import arms, page, plan, record, runner, workdir
from spa_jax.study.plan import Study
from tests import runs
from tests.study import synthetic


def _record(study: Study) -> dict:
    going = runner.Runner(study, ["true"], 2, lambda going: None)
    return record.record(study, going, record.Ran("p.flags", ["study", "--arms=<spa>"]))


CREDIT = {"subgoal_auc": 0.9, "subgoal_auc_low": 0.8, "subgoal_auc_high": 0.95, "auc": 0.7}


@pytest.fixture
def study(tmp_path) -> Study:
    found = synthetic.study(tmp_path, "sft", "terminal", "spa", "ridge", "spa:beta=0")
    for seed in (0, 1):
        synthetic.leave(found, "start", seed, won=2)
        synthetic.leave(found, "terminal", seed, won=3 + seed)
        synthetic.leave(found, "spa", seed, won=6 + seed, credit=CREDIT)
    return found


def test_the_record_holds_what_was_found(study):
    found = json.loads(json.dumps(_record(study)))
    assert found["games"] == synthetic.GAMES and found["reference"] == "terminal"
    rates = {name: arm["success"] for name, arm in found["arms"].items()}
    assert math.isnan(rates.pop("spa:beta=0"))
    assert rates == pytest.approx({"sft": 0.2, "terminal": 0.35, "spa": 0.65, "ridge": 0.35})
    spa = found["arms"]["spa"]
    assert spa["seeds"]["1"]["outcomes"] == "1111111000"
    assert [p["episodes"] for p in spa["curve"]] == [0, 64]
    assert spa["credit"] == pytest.approx(CREDIT)
    assert spa["estimator_is_used"] and not found["arms"]["terminal"]["estimator_is_used"]
    assert found["arms"]["spa:beta=0"]["settings"] == {"beta": 0.0}
    # Three games more in either seed, none lost.
    difference = found["differences"]["spa"]
    assert difference["difference"] == pytest.approx(0.3)
    assert (difference["gained"], difference["lost"]) == (6, 0)
    assert difference["p"] == pytest.approx(2 * 0.5**6)
    assert found["base"]["digest"] == plan.made_from(study, study.start(0))["base"]
    assert found["runs"] == {"finished": 4, "all": 6, "failed": {}}


def test_an_arm_that_computes_the_same_has_the_same_runs(study):
    """The preset's critic is the ridge one, so `ridge` is `terminal`."""
    found = _record(study)
    assert found["arms"]["ridge"]["same_as"] == "terminal"
    assert found["differences"]["ridge"]["difference"] == 0
    assert not any("ridge" in job.name for job in runner.jobs(study))


def test_seeds_come_before_arms_and_wait_for_what_they_begin_with(study):
    names = [job.name for job in runner.jobs(study)]
    assert names == [
        f"{name}/seed_{seed}"
        for seed in (0, 1)
        for name in ("start", "terminal", "spa", "spa_beta=0")
    ]
    assert {job.after for job in runner.jobs(study)[1:4]} == {("start/seed_0",)}


class _Page(html.parser.HTMLParser):
    """Checks that elements close in order, and collects what is shown."""

    VOID = {"meta", "link", "br", "path", "use", "line", "rect", "circle"}

    def __init__(self):
        super().__init__()
        self.open, self.text, self.fetched = [], [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v[:1] not in ("#", "d")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_it_and_needs_nothing_else(study):
    found = _record(study)
    page.write(found, study.files.page)
    written = study.files.page.read_text()
    parsed = _Page()
    parsed.feed(written)
    assert not parsed.open and not parsed.fetched
    shown = " ".join(" ".join(parsed.text).split())
    assert "spa wins more than terminal." in shown
    for text in ("65.0%", "+30.0", "6, 0", "0.031", "--beta=0.0", "0.80 to 0.95", "4 of 6 runs"):
        assert text in shown, text
    assert "--arms=<spa>" in shown and "<spa>" not in written  # escaped
    assert written.count("<svg") == 3
    # From the file it is the same page: JSON has null where numbers are not known.
    files.write_json(study.files.json, found)
    assert page.render(json.loads(study.files.json.read_text())) == written


def test_a_study_of_nothing_yet_has_a_page(tmp_path):
    study = synthetic.study(tmp_path, "spa")
    assert "No two arms have run yet." in page.render(_record(study))


def test_a_result_of_other_settings_is_refused(tmp_path):
    study = synthetic.study(tmp_path, "spa")
    synthetic.leave(study, "spa", 0, won=1)
    file = workdir.result(study.run(study.arms[0], 0).workdir)
    was = json.loads(file.read_text())
    was["made_from"]["settings"]["beta"] = 0.1
    file.write_text(json.dumps(was))
    with pytest.raises(UserError, match="with other settings: --beta was 0.1, is 0.5"):
        _record(study)
    del was["made_from"]["settings"]["beta"]  # older than the setting: it had the default
    file.write_text(json.dumps(was))
    _record(study)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="the base policy's weights are others"):
        _record(study)
    file.write_text("[]")
    with pytest.raises(UserError, match="not a run's result"):
        _record(study)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="--reference=sft is none of the arms spa"):
        synthetic.study(tmp_path, "spa", reference="sft")
    with pytest.raises(UserError, match="drop --base, or the arm"):
        synthetic.study(tmp_path, "spa", "continued_sft")
    with pytest.raises(UserError, match="--base_per_seed"):
        synthetic.study(tmp_path, "spa", base_per_seed=True)
    preset = runs.make(tmp_path)
    alone = Study(preset, tuple(arms.choose(["continued_sft"], preset.settings)), (0,))
    with pytest.raises(UserError, match="as many tokens as an arm with rounds"):
        runner.jobs(alone)


def test_one_study_at_a_time(tmp_path):
    with runner.alone(workdir.Workdir(tmp_path)):
        with pytest.raises(UserError, match="runs there already"):
            with runner.alone(workdir.Workdir(tmp_path)):
                pass
    with runner.alone(workdir.Workdir(tmp_path)):
        pass


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: {0, 2, 4, 5, 7})
    assert [runner.cores_of(i, 2) for i in (0, 1)] == [[0, 2], [4, 5, 7]]
    assert runner.cores_of(0, 1) == [] and runner.cores_of(3, 6) == []


def test_times():
    assert [runner.clock(s) for s in (0, 61.4, 3600 * 30 + 5)] == ["0:00:00", "0:01:01", "30:00:05"]
