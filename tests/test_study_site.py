"""The website of a study over HTTP: what raters may do and see, and what is kept of them."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from baco.errors import BacoError
from baco.study import website
from baco.study.schedule import schedule, training
from baco.study.store import Rater
from baco.study.study import Study
from baco.study.website import HEADERS, Allowance, Website, WebsiteSettings
from benchmarks.study_load import StudyServer, check, load
from tests.report_runs import EVIL
from tests.studies import METHODS, made_study, right_responses

KEY = "the operator's key"


class Site:
    """A study, its website and a browser without JavaScript."""

    def __init__(self, study: Study, **settings: Any) -> None:
        self.study = study
        site = Website(study, WebsiteSettings(KEY, **settings))
        self.client = TestClient(site.app(), raise_server_exceptions=False)

    def rater(self) -> Rater:
        rater = self.study.store.add_rater()
        assert rater is not None
        return rater

    def rating(self) -> Rater:
        """A rater after consent and questions."""
        rater = self.rater()
        self.study.store.update_rater(rater.id, "consented")
        self.study.store.update_rater(rater.id, "rating")
        return rater

    def post(self, rater: Rater, position: int, responses: Any, seconds: Any = 1.0) -> Any:
        body = {"plan": self.study.plan.hash, "position": position}
        body |= {"responses": responses, "seconds": seconds}
        return self.client.post(f"/r/{rater.link}/answer", json=body)

    def answer_all(self, rater: Rater, until: int = 1000) -> None:
        """Right answers to the training and the items that are not answered, up to a position."""
        assert rater.number is not None
        plan = self.study.plan
        answered = {answer.position for answer in self.study.store.answers(rater.id)}
        for screen in (*training(plan), *schedule(plan, rater.number)):
            if screen.position in answered or screen.position >= until:
                continue
            reply = self.post(rater, screen.position, right_responses(plan, screen))
            assert reply.json()["saved"], reply.text


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    study = made_study(tmp_path, prompts=3, set_size=4, block=4)
    yield Site(study)
    study.close()


def test_a_rater_goes_from_consent_to_thanks(site: Site) -> None:
    rater = site.rater()
    home = f"/r/{rater.link}"
    assert "Welcome" in site.client.get(home).text
    assert "What to do" in site.client.post(f"{home}/consent").text
    wrong = site.client.post(f"{home}/questions", data={"q0": "0", "q1": "2", "q2": "1"})
    assert "The same idea in other words is not different." in wrong.text
    assert (
        "Training 1 of 4"
        in site.client.post(f"{home}/questions", data={"q0": "1", "q1": "2", "q2": "1"}).text
    )
    site.answer_all(rater, until=0)
    assert "The training is over" in site.client.get(home).text
    assert "Item 1 of 9" in site.client.get(f"{home}/0").text
    site.answer_all(rater)
    assert "All items are answered" in site.client.get(home).text
    assert "Thank you" in site.client.post(f"{home}/finish").text
    (row,) = site.study.store.raters()
    assert (row.state, row.mistakes) == ("finished", 1)
    assert {judgment.passed for judgment in site.study.judgments()} == {True, None}


def test_nothing_that_a_rater_gets_names_methods_or_items(site: Site) -> None:
    rater, plan = site.rating(), site.study.plan
    hidden = {*METHODS, "P-Punc", "aligned", "base ", "check", "repeated", "shuffled", "trip-"}
    hidden |= {item.id for item in plan.items} | {stimulus.id for stimulus in plan.stimuli}
    hidden |= {text for stimulus in plan.stimuli for text in stimulus.texts}
    for screen in schedule(plan, 0):
        site.answer_all(rater, until=screen.position)
        page = site.client.get(f"/r/{rater.link}/{screen.position}")
        # What the page says for everybody.
        text = re.sub(r'<details class="help">.*?</details>', "", page.text, flags=re.DOTALL)
        text = re.sub(r'type="submit"[^>]*>Check<|class="check"', "", text)
        assert not [word for word in hidden if word.lower() in text.lower()]
        assert not [word for word in hidden if word.lower() in str(page.headers).lower()]


def test_both_sides_have_the_same_markup(site: Site) -> None:
    rater = site.rating()
    site.answer_all(rater, until=0)
    page = site.client.get(f"/r/{rater.link}/0").text
    sides = re.findall(r'<section class="side".*?</section>', page.split("<form")[0], re.DOTALL)
    assert len(sides) == 2
    bare = [re.sub(r"(<li [^>]*>).*?</li>", r"\1", side).replace("B", "A") for side in sides]
    assert bare[0] == bare[1]


def test_pages_load_nothing_from_elsewhere_and_forbid_it(site: Site) -> None:
    rater = site.rating()
    for path in ("/", f"/r/{rater.link}", "/operator", "/r/none"):
        page = site.client.get(path)
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert page.headers["referrer-policy"] == "no-referrer"
        assert page.headers["cache-control"] == "no-store"
        loaded = re.findall(r'(?:src|href|action)="([^"#]+)"', page.text)
        assert loaded
        assert all(address.startswith(("/", "data:,")) for address in loaded)
        assert not re.search(r"<style|style=|<script(?! src)| on\w+=", page.text)


def test_texts_of_models_and_prompts_are_escaped(tmp_path: Path) -> None:
    run = {"text": lambda method, prompt, sample: f"{prompt} {sample} {method} {EVIL}"}
    study = made_study(tmp_path, run=run, prompts=3, title=f"A {EVIL}")
    site = Site(study)
    rater = site.rating()
    site.answer_all(rater, until=0)
    page = site.client.get(f"/r/{rater.link}/0").text
    assert "<script>window" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert "<img src=x onerror=window.evil=1>" in unescape(page)


def test_an_answer_is_kept_once_and_the_last_one_counts(site: Site) -> None:
    rater, plan = site.rating(), site.study.plan
    site.answer_all(rater, until=0)
    screen = schedule(plan, 0)[0]
    responses = right_responses(plan, screen)
    changed = responses | {next(iter(responses)): (5, 4) if screen.item.unit == "set" else (2, 1)}
    for sent in (responses, responses, changed, changed):
        assert site.post(rater, 0, sent).json() == {"saved": True}
    (kept,) = (a for a in site.study.store.answers(rater.id) if a.position == 0)
    assert kept.responses == changed
    assert kept.revisions == 1


def test_parts_of_an_answer_are_saved_and_the_item_stays_open(site: Site) -> None:
    rater, plan = site.rating(), site.study.plan
    site.answer_all(rater, until=0)
    responses = right_responses(plan, schedule(plan, 0)[0])
    first = dict([next(iter(responses.items()))])
    assert site.post(rater, 0, first).json()["saved"]
    page = site.client.get(f"/r/{rater.link}").text
    assert "Item 1 of 9" in page
    assert page.count(" checked>") == 2 + 1  # both ratings, and the keyboard's switch


def test_a_block_is_open_until_the_next_one_has_an_answer(site: Site) -> None:
    rater, plan = site.rating(), site.study.plan
    screens = schedule(plan, 0)
    second = next(screen for screen in screens if screen.block == 1)
    last = screens[second.position - 1]
    site.answer_all(rater, until=second.position)
    assert "Time for a break" in site.client.get(f"/r/{rater.link}").text
    for screen in screens[: second.position]:
        assert site.post(rater, screen.position, right_responses(plan, screen)).json()["saved"]
    assert (
        f"Item {second.position} of 9" in site.client.get(f"/r/{rater.link}/{last.position}").text
    )
    site.post(rater, second.position, right_responses(plan, second))
    page = site.client.get(f"/r/{rater.link}/{second.position}").text
    assert f"Item {second.position + 1} of 9" in page
    assert 'id="back"' not in page
    for position in (last.position, 0, -1, second.position + 2, 99):
        reply = site.post(rater, position, {})
        assert reply.status_code == 409
        assert not reply.json()["saved"]
    assert "Item 1 of" not in site.client.get(f"/r/{rater.link}/0").text


@pytest.mark.parametrize(
    "body",
    [
        "no JSON",
        "[]",
        "[" * 60_000,
        '{"position": 0.0, "responses": {}, "seconds": 1}',
        '{"position": true, "responses": {}, "seconds": 1}',
        '{"position": 0, "responses": [], "seconds": 1}',
        '{"position": 0, "responses": {"other": "left"}, "seconds": 1}',
        '{"position": 0, "responses": {"quality": "middle"}, "seconds": 1}',
        '{"position": 0, "responses": {"quality_rating": [0, 6]}, "seconds": 1}',
        '{"position": 0, "responses": {"quality_rating": [3]}, "seconds": 1}',
        '{"position": 0, "responses": {}, "seconds": -1}',
        '{"position": 0, "responses": {}, "seconds": NaN}',
        '{"position": 0, "responses": {}, "seconds": "long"}',
    ],
)
def test_a_malformed_answer_is_refused_and_nothing_is_kept(site: Site, body: str) -> None:
    site.rating()
    rater = site.rating()  # number 1 begins with single answers
    site.answer_all(rater, until=0)
    before = site.study.store.answers(rater.id)
    body = body.replace("{", '{"plan": "' + site.study.plan.hash + '", ', 1)
    reply = site.client.post(f"/r/{rater.link}/answer", content=body)
    assert reply.status_code == 400
    assert site.study.store.answers(rater.id) == before


def test_a_page_of_an_earlier_plan_is_loaded_again_and_new_sides_are_kept(site: Site) -> None:
    rater, plan = site.rating(), site.study.plan
    site.answer_all(rater, until=1)
    (before,) = (a for a in site.study.store.answers(rater.id) if a.position == 0)
    body = {"plan": "0" * 64, "position": 0, "responses": {}, "seconds": 1}
    assert site.client.post(f"/r/{rater.link}/answer", json=body).status_code == 409
    assert before in site.study.store.answers(rater.id)
    turned = replace(before, left=before.right, right=before.left, position=5, version=2)
    site.study.store.save([turned])
    (after,) = (a for a in site.study.store.answers(rater.id) if a.item == before.item)
    assert after == turned
    assert plan.stimulus[after.left] != plan.stimulus[before.left]


@pytest.mark.parametrize("option", ["9" * 5000, "-1", "3", ""])
def test_an_option_that_a_question_does_not_have_is_wrong(site: Site, option: str) -> None:
    home = f"/r/{site.rater().link}"
    site.client.post(f"{home}/consent")
    answers = {"q0": option, "q1": "2", "q2": "1"}
    assert site.client.post(f"{home}/questions", data=answers).status_code == 200
    (rater,) = site.study.store.raters()
    assert (rater.state, rater.mistakes) == ("consented", 1)


def test_a_time_beyond_all_numbers_is_bounded_like_any_other(site: Site) -> None:
    site.rating()
    rater = site.rating()
    site.answer_all(rater, until=0)
    body = '{"plan": "%s", "position": 0, "responses": {}, "seconds": 1%s}'
    body %= site.study.plan.hash, "0" * 400
    assert site.client.post(f"/r/{rater.link}/answer", content=body).status_code == 200
    assert all(answer.seconds < 60 for answer in site.study.store.answers(rater.id))


def test_a_body_that_is_too_long_is_refused(site: Site) -> None:
    rater = site.rating()
    assert site.client.post(f"/r/{rater.link}/answer", content=b"x" * 70_000).status_code == 413
    many = "&".join(f"q{number}=1" for number in range(101))
    assert site.client.post("/operator", content=many).status_code == 413


def test_nobody_is_longer_on_an_item_than_the_server_saw(site: Site) -> None:
    rater, plan = site.rating(), site.study.plan
    site.answer_all(rater, until=0)
    site.post(rater, 0, right_responses(plan, schedule(plan, 0)[0]), seconds=5000)
    (kept,) = (a for a in site.study.store.answers(rater.id) if a.position == 0)
    assert kept.seconds < 1000


def test_a_full_disk_is_reported_and_nothing_is_lost(tmp_path: Path) -> None:
    site = Site(made_study(tmp_path, prompts=12, set_size=4))
    rater, plan = site.rating(), site.study.plan
    site.answer_all(rater, until=1)
    database = site.study.store._database
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    for screen in schedule(plan, 0)[1:]:
        before = site.study.store.answers(rater.id)
        reply = site.post(rater, screen.position, right_responses(plan, screen))
        if reply.status_code != 200:
            break
    assert reply.status_code == 507
    assert reply.json() == {
        "saved": False,
        "reason": "the server cannot save answers at the moment",
    }
    assert site.study.store.answers(rater.id) == before
    (kept, *_) = before
    with pytest.raises(BacoError, match="the disk is full; free some space and try again"):
        site.study.store.save([replace(kept, item=f"{kept.item}/{n}") for n in range(100)])
    database.execute("PRAGMA max_page_count = 100000")
    site.answer_all(rater)
    assert "All items are answered" in site.client.get(f"/r/{rater.link}").text


def test_withdrawing_deletes_all_answers_and_frees_the_place(site: Site) -> None:
    rater, other = site.rating(), site.rating()
    site.answer_all(rater)
    site.answer_all(other)
    asked = site.client.get(f"/r/{rater.link}/withdraw").text
    assert "cannot be undone" in asked
    kept = site.study.store.answers(other.id)
    assert "Your answers are deleted" in site.client.post(f"/r/{rater.link}/withdraw").text
    assert site.study.store.answers() == kept
    assert "Your answers are deleted" in site.client.get(f"/r/{rater.link}").text
    assert site.post(rater, 0, {}).status_code == 409
    assert site.rater().number == rater.number
    # Nor do the deleted rows stay in the file.
    site.client.post(f"/r/{other.link}/withdraw")
    files = [path.read_bytes() for path in site.study.path.glob("judgments.sqlite*")]
    assert all(b'"quality_rating": [' not in content for content in files)


def test_neither_the_log_nor_the_file_has_addresses_or_links(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    rater = site.rating()
    with caplog.at_level(logging.INFO, "baco.access"):
        site.client.get(f"/r/{rater.link}", headers={"X-Forwarded-For": "203.0.113.7"})
        site.client.get(f"/{rater.link}/elsewhere")
        site.answer_all(rater)
    paths = {json.loads(record.message)["path"] for record in caplog.records}
    assert paths == {"/r/…", "other", "/r/…/answer"}
    files = [path.read_bytes() for path in site.study.path.glob("judgments.sqlite*")]
    for secret in ("testclient", "203.0.113.7", "127.0.0.1"):
        assert secret not in caplog.text
        assert all(secret.encode() not in content for content in files)
    assert str(rater.link) not in caplog.text


def test_the_file_of_judgments_is_the_owners_alone(site: Site) -> None:
    assert (site.study.path / "judgments.sqlite").stat().st_mode & 0o077 == 0


def test_links_cannot_be_guessed(site: Site) -> None:
    links = {str(site.rater().link) for _ in range(4)}
    assert len(links) == 4
    assert all(re.fullmatch(r"[\w-]{24}", link) for link in links)  # 144 bits
    assert site.client.get("/r/" + "A" * 24).status_code == 404


def test_requests_are_bounded_per_link_and_not_per_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No time passes: with it the allowance comes back.
    monkeypatch.setattr(website, "Allowance", lambda most: Allowance(most, lambda: 0.0))
    site = Site(made_study(tmp_path), per_minute=10)
    rater, other = site.rating(), site.rating()
    replies = [site.client.get(f"/r/{rater.link}").status_code for _ in range(11)]
    assert replies == [200] * 10 + [429]
    assert site.client.get(f"/r/{other.link}").status_code == 200
    guesses = [site.client.get(f"/r/{number}").status_code for number in range(11)]
    assert guesses == [404] * 10 + [429]
    assert site.client.get(f"/r/{other.link}").status_code == 200


def test_an_allowance_comes_back_with_time() -> None:
    now = 0.0
    allowance = Allowance(60, lambda: now)
    for _ in range(60):
        allowance.take("link")
    with pytest.raises(Exception, match="429"):
        allowance.take("link")
    now = 1.0
    allowance.take("link")


def test_a_worker_of_prolific_has_one_link_and_is_not_stored(tmp_path: Path) -> None:
    site = Site(made_study(tmp_path, raters=2), crowd="prolific", completion_code="C0DE")
    first = site.client.get("/join?PROLIFIC_PID=5f00ba12&STUDY_ID=1", follow_redirects=False)
    again = site.client.get("/join?PROLIFIC_PID=5f00ba12&STUDY_ID=1", follow_redirects=False)
    assert first.status_code == 303
    assert first.headers["location"] == again.headers["location"]
    assert len(site.study.store.raters()) == 1
    files = [path.read_bytes() for path in site.study.path.glob("judgments.sqlite*")]
    assert all(b"5f00ba12" not in content for content in files)
    assert site.client.get("/join").status_code == 400
    assert site.client.get("/join?PROLIFIC_PID=two").status_code == 200
    full = site.client.get("/join?PROLIFIC_PID=three")
    assert full.status_code == 409
    assert "enough participants" in full.text


def test_a_finished_worker_gets_the_completion_code(tmp_path: Path) -> None:
    site = Site(made_study(tmp_path, prompts=3), crowd="prolific", completion_code="C0DE")
    rater = site.rating()
    site.answer_all(rater)
    done = site.client.post(f"/r/{rater.link}/finish").text
    assert "https://app.prolific.com/submissions/complete?cc=C0DE" in done
    turk = Site(site.study, crowd="mturk")
    assert rater.code in turk.client.get(f"/r/{rater.link}").text
    preview = turk.client.get("/join?assignmentId=ASSIGNMENT_ID_NOT_AVAILABLE")
    assert "This is its preview." in preview.text


def test_there_is_no_joining_without_a_crowd(site: Site) -> None:
    assert site.client.get("/join?PROLIFIC_PID=1").status_code == 404


def test_the_operators_page_needs_the_key(site: Site) -> None:
    rater = site.rating()
    assert str(rater.link) not in site.client.get("/operator").text
    wrong = site.client.post("/operator", data={"key": "guess"})
    assert wrong.status_code == 403
    assert str(rater.link) not in wrong.text
    opened = site.client.post("/operator", data={"key": KEY})
    assert str(rater.link) in opened.text
    assert not any(method in opened.text for method in METHODS)
    site.client.cookies.clear()
    assert str(rater.link) not in site.client.get("/operator").text


def test_the_hash_of_the_plan_is_on_every_page(site: Site) -> None:
    rater = site.rating()
    for path in ("/", f"/r/{rater.link}", "/operator", f"/r/{rater.link}/withdraw", "/r/none"):
        assert site.study.plan.hash[:16] in site.client.get(path).text


def test_a_fault_of_the_server_is_a_page_without_details(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("the inner workings")

    monkeypatch.setattr(site.study.store, "rater", broken)
    reply = site.client.get("/r/any")
    assert reply.status_code == 500
    assert "inner workings" not in reply.text
    assert reply.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]


def test_thirty_raters_at_once_lose_nothing_though_the_server_is_killed(tmp_path: Path) -> None:
    study = made_study(tmp_path, prompts=1, raters=30)
    study.close()
    server = StudyServer(study.path, "--per-minute", "100000")
    try:
        done, _ = asyncio.run(load(server, study.plan, 30, kill=True, each_choice=False))
    finally:
        server.kill()
    assert done.repeated > 0
    study = Study.open(study.path)
    assert check(study, done) == 30 * (2 + 3 + 4)
    study.close()
