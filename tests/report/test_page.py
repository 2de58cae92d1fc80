import dataclasses
import html.parser
import json
import re
import subprocess
import sys

import pytest

from spa_jax import files, judging, store, truth
from spa_jax import run as run_lib
from spa_jax.errors import UserError
from spa_jax.report.page import write_report
from tests.report import synthetic

# Elements that need no end tag in the page.
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """The page as a reader of HTML sees it: elements, attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.text, self.open, self.problems = [], [], [], []
        self.feed(self.source)
        self.close()
        self.problems += [f"<{tag}> stays open" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at line {self.getpos()[0]}")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "text"):
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))

    def count(self, tag, name=None):
        return sum(
            t == tag and (name is None or name in (a.get("class") or "").split())
            for t, a in self.elements
        )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "quickstart"
    return synthetic.make_workdir(folder, games=24, rounds=2, updates=20)


@pytest.fixture(scope="module")
def page(workdir):
    write_report(workdir, workdir / "report.html")
    return Page(workdir / "report.html")


def test_the_page_is_well_formed(page):
    assert page.problems == []


def test_the_page_asks_nobody_for_anything(page):
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "img", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith("#") or value == "data:,", (tag, value)
    assert not re.search(r"url\((?!#)|@import|https?://|//[a-z]", page.source)


def test_references_inside_the_figures_find_their_target(page):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)) and len(ids) > 4
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page.source))
    assert used and used <= set(ids)


def test_figures_take_their_colours_from_the_page(page):
    drawn = "".join(re.findall(r"<svg viewBox=\"0 0 \d.*?</svg>", page.source, re.DOTALL))
    assert "var(--series-1)" in drawn and "var(--minus)" in drawn
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#ffffff"}
    assert "prefers-color-scheme: dark" in page.source


def test_the_table_has_every_evaluation_with_its_interval(page, workdir):
    won = {}
    for name in ("sft", "spa", "continued_sft"):
        played = store.read(workdir / "eval" / name / "trajectories.jsonl")
        won[name] = sum(t.success for t in played)
    for text in (f"{won['sft']} / 24", f"{won['spa']} / 23", f"{won['continued_sft']} / 24"):
        assert text in page.words
    assert re.search(r"Base \(SFT\) .*SPA .*continued SFT", page.words)
    assert f"{100 * won['spa'] / 23:.1f}%" in page.words
    assert "asked for" in page.words
    assert "Of 23 games that both played" in page.words


def test_every_stage_and_round_is_there(page):
    for title in ("Cloning the expert", "Learning what a step is worth", "Improving the policy",
                  "Success while training", "KL from the base", "Exploration, round 2",
                  "clip fraction"):
        assert title in page.words, title
    assert "40 updates in 2 rounds" in page.words


def test_transcripts_show_each_step_beside_what_it_got(page, workdir):
    played = store.read(workdir / "eval" / "spa" / "trajectories.jsonl")
    shown = [t for t in played if t.task in page.words]
    wins = [t for t in shown if t.success]
    assert (len(wins), len(shown)) == (4, 8)
    assert page.count("details", "episode") == 8
    assert page.count("li", "step") == sum(len(t.steps) for t in shown)
    assert page.count("span", "mark") == 2 * page.count("li", "step")
    assert page.count("span", "no") == sum(not s.grounded for t in shown for s in t.steps)
    for t in shown:
        total = sum(step.contribution for step in t.steps)
        assert f"sum {total:.2f}".replace("-", "\N{MINUS SIGN}") in page.words


def test_the_steps_are_judged_before_the_sums(page, workdir):
    played = store.read(workdir / "eval" / "sft" / "trajectories.jsonl")
    given = judging.contributions(played)
    found = judging.judge_episodes(played, given)
    assert found["subgoal_auc"] > 0.9 and found["judged_episodes"] == 24
    steps, sums = page.words.index("Base (SFT): the steps"), page.words.index(": the sums")
    auc, low = found["subgoal_auc"], found["subgoal_auc_low"]
    shown = page.words.index(f"{auc:.2f} subgoals: how often")
    assert steps < shown < sums < page.words.index("error over variance")
    assert f"95% interval {low:.2f} to {found['subgoal_auc_high']:.2f}." in page.words
    for good in ("0.96 and more is good", "0.95 and more is good", "10% and less is good",
                 "no further from 0 than that of the true advantages"):
        assert steps < page.words.index(good) < sums, good
    # What chance gives, on the same episodes.
    uniform = judging.placebos(given, [t.final_reward for t in played])["uniform"]
    chance = judging.judge_episodes(played, uniform, draws=0)
    assert chance["subgoal_auc_within"] == 0.5
    row = f"spread evenly {chance['subgoal_auc']:.2f} 0.50 {100 * chance['first_step_share']:.0f}%"
    assert row in page.words
    assert "experiments.judge_credit finds them out" in page.words


def test_an_environment_that_tells_no_progress_is_named_as_one(tmp_path):
    rng = synthetic.np.random.default_rng(0)
    played = [synthetic.episode(rng, i, 0.5, annotate=True) for i in range(6)]
    played = [dataclasses.replace(t, initial_progress=None) for t in played]
    store.write(tmp_path / "eval" / "sft" / "trajectories.jsonl", played)
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.problems == []
    assert "The environment does not tell progress in these episodes" in page.words
    assert "0.96 and more" not in page.words and "10% and less is good" in page.words


def test_true_advantages_are_shown_for_the_episodes_that_they_are_of(tmp_path):
    """Base and SPA play the same games, so their episodes have the same keys."""
    rng = synthetic.np.random.default_rng(0)
    for name in ("sft", "spa"):
        played = [synthetic.episode(rng, i, 0.5, annotate=True) for i in range(6)]
        store.write(tmp_path / "eval" / name / "trajectories.jsonl", played)
    base = store.read(tmp_path / "eval" / "sft" / "trajectories.jsonl")[:4]
    rewards = {t.key: rng.integers(0, 2, (len(t.steps), 8)).astype(float) for t in base}
    told = {t.key: truth.estimate(rewards[t.key], t.final_reward) for t in base}
    run = run_lib.at(tmp_path)
    files.write_json(run.advantages, truth.to_json(told, evaluation="sft", branches=4))
    advantages = truth.read_advantages(run.advantages, "sft")
    every = store.read(tmp_path / "eval" / "sft" / "trajectories.jsonl")
    found = judging.judge_episodes(every, judging.contributions(every), advantages)
    critic = found | {"advantage_correlation": 0.77, "subgoal_auc": float("nan")}
    files.write_json(run.credits, {"evaluation": "sft", "credits": {"ridge critic": critic}})
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.problems == []
    shown = f"{found['advantage_correlation']:+.2f}".replace("-", "\N{MINUS SIGN}")
    assert f"{shown} rank correlation with the true advantages" in page.words
    assert "after each step of 4 episodes" in page.words
    assert re.search("ridge critic: differences of its values \N{EN DASH} .*? [+]0.77 ", page.words)
    assert page.words.count("finds them out") == 1 and page.words.count("ridge critic") == 1


def test_the_same_workdir_gives_the_same_page(page, workdir, tmp_path):
    write_report(workdir, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page.source


def test_hostile_text_stays_text(tmp_path):
    evil = synthetic.HOSTILE
    t = synthetic.episode(synthetic.np.random.default_rng(0), 1, 1.0, annotate=True)
    steps = tuple(
        dataclasses.replace(step, observation=evil, response=f"{evil} go", action=evil)
        for step in t.steps
    )
    t = dataclasses.replace(
        t, steps=steps, task=evil, split=evil, task_type=evil, instruction=evil,
        final_observation=evil,
    )
    store.write(tmp_path / "eval" / "spa" / "trajectories.jsonl", [t])
    store.write(tmp_path / "eval" / "<b>x" / "trajectories.jsonl", [t])
    synthetic.write_metrics(tmp_path / "sft", [{"update": 1, "time": 0, "<script>a": 1.0}])
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.problems == []
    assert not [tag for tag, _ in page.elements if tag in ("script", "img")]
    # It is there to be read, as it was written; nothing inside it was evaluated.
    assert "<script>alert('owned')</script>" in page.words
    assert "{{ 7 * 7 }} &amp; \"quoted\" 'single' \ufffd" in page.words


@pytest.mark.parametrize("keep", ["demos", "sft", "iteration_0", "eval"])
def test_missing_stages_are_left_out(workdir, tmp_path, keep):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / keep).symlink_to(workdir / keep)
    write_report(tmp_path / "run", tmp_path / "out" / "page.html")
    page = Page(tmp_path / "out" / "page.html")
    assert page.problems == []
    assert ("No policy has been evaluated yet" in page.words) == (keep != "eval")
    assert ("Cloning the expert" in page.words) == (keep == "sft")
    assert ("Exploration" in page.words) == (keep == "iteration_0")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]


def test_an_evaluation_without_annotations_or_steps_still_shows(tmp_path):
    rng = synthetic.np.random.default_rng(0)
    played = [synthetic.episode(rng, i, 0.5) for i in range(6)]
    played[0] = dataclasses.replace(played[0], steps=())
    store.write(tmp_path / "eval" / "sft" / "trajectories.jsonl", played)
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "Transcripts of Base (SFT)" in page.words
    assert "What the estimator knows" not in page.words


def test_metrics_that_are_never_numbers_draw_nothing(tmp_path):
    records = [{"update": n, "time": n, "loss": None, "valid_loss": 0.5} for n in (1, 2)]
    synthetic.write_metrics(tmp_path / "sft", records)
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.count("figure") == 1 and "held out 0.500" in page.words


def test_a_loss_is_told_as_one(tmp_path):
    rng = synthetic.np.random.default_rng(0)
    for name, skill in (("sft", 1.0), ("spa", 0.0)):
        played = [synthetic.episode(rng, i, skill, annotate=True) for i in range(5)]
        store.write(tmp_path / "eval" / name / "trajectories.jsonl", played)
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "\N{MINUS SIGN}100.0 points" in page.words
    assert "SPA alone won 0 and the base alone 5" in page.words
    # One class only: no area, no variance.
    assert "best constant scores 1" in page.words and "\N{EN DASH}" in page.words


def test_mistakes_name_the_folder_or_the_line(tmp_path):
    with pytest.raises(UserError, match="--workdir=.*none: no such folder"):
        write_report(tmp_path / "none", tmp_path / "report.html")
    with pytest.raises(UserError, match="nothing to report"):
        write_report(tmp_path, tmp_path / "report.html")
    (tmp_path / "eval" / "spa").mkdir(parents=True)
    (tmp_path / "eval" / "spa" / "trajectories.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="trajectories.jsonl:1: trajectory schema None"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_binary_writes_the_page_or_says_what_is_wrong(workdir, tmp_path):
    command = [sys.executable, "-m", "experiments.report"]
    done = subprocess.run(
        [*command, f"--workdir={workdir}", f"--out={tmp_path / 'r.html'}"],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"RESULT report={tmp_path / 'r.html'}"
    assert (tmp_path / "r.html").stat().st_size > 10_000
    wrong = subprocess.run(
        [*command, f"--workdir={tmp_path / 'none'}"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "no such folder" in wrong.stderr and "Traceback" not in wrong.stderr


def test_the_fixture_is_what_the_other_rooms_write(workdir):
    lines = (workdir / "sft" / "metrics.jsonl").read_text().splitlines()
    assert {"update", "time", "loss"} <= json.loads(lines[0]).keys()
