"""`dead-letters`: what Zion refused for good can be listed, shown, sent again and dropped, each letter in one step."""

from __future__ import annotations

import json
import re
import subprocess
import time

import pytest

from sentinel_shared.errors import RedisOutcomeUnknown
from sentinel_usage_worker import dead_letters
from tests.support.redis_server import free_port
from tests.support.system import bare_environ, script

pytestmark = pytest.mark.xdist_group("usage-worker-dead-letters")


@pytest.fixture
def command(bench, capsys):
    """Gives a command: its exit code, what it printed, what it complained of."""

    async def run(*words, now_s=None):
        options = dead_letters.parser().parse_args(["dead-letters", *words])
        code = await dead_letters.run(bench.queue, options, now_s=now_s or time.time())
        return code, *capsys.readouterr()

    return run


@pytest.fixture
async def letters(bench):
    """Three, of one user; the worker that made them goes on with `bench.hand()`."""
    (name,) = await bench.users()
    bench.trouble(kind="partial", permanent=True)
    await bench.use(name)
    await bench.tick(bench.hand())
    bench.well()
    found = await bench.queue.dead_letters()
    assert len(found) == 3
    return {letter.limit_name: letter for letter in found}


async def test_the_list_has_a_line_each(command, letters):
    letter = letters["ai_output_tokens"]
    code, said, complaint = await command("list", now_s=letter.since_ms / 1000 + 90)
    lines = [line.split("\t") for line in said.splitlines()]
    assert (code, complaint, len(lines)) == (0, "", 3)
    assert [letter.letter_id, letter.external_id, "ai_output_tokens", "7", "90s", letter.reason] in lines


async def test_the_list_as_json_has_an_object_a_line(command, letters):
    _, said, _ = await command("list", "--json")
    told = [json.loads(line) for line in said.splitlines()]
    assert {one["letter_id"] for one in told} == {letter.letter_id for letter in letters.values()}
    assert {one["amount"] for one in told} == {1, 5, 7}


async def test_whatever_a_user_is_called_it_stays_one_line(bench, command):
    name = "line\nbreak\t\x1b[31mé"
    await bench.open_account(name)
    await bench.use(name)
    await bench.tick(bench.hand())
    _, said, _ = await command("list")
    assert [line.split("\t")[1] for line in said.splitlines()] == ["line\\nbreak\\t\\x1b[31mé"] * 3


async def test_show_tells_all_of_one(command, letters):
    letter = letters["ai_requests"]
    code, said, _ = await command("show", letter.letter_id)
    assert code == 0
    assert json.loads(said) == {
        "letter_id": letter.letter_id,
        "external_id": letter.external_id,
        "limit_name": "ai_requests",
        "amount": 1,
        "since_ms": letter.since_ms,
        "reason": letter.reason,
    }


async def test_replayed_ones_reach_zion_under_a_new_key(bench, command, letters):
    before = letters["ai_requests"].letter_id.partition("-")[0]
    names = [letters[name].letter_id for name in ("ai_requests", "ai_input_tokens")]
    assert await command("replay", *names) == (0, "2 replayed\n", "")
    await bench.ticks_until(bench.hand(), lambda: sum(bench.booked(letters["ai_requests"].external_id).values()) == 6)
    assert before not in bench.keys_seen()
    assert [letter.limit_name for letter in await bench.queue.dead_letters()] == ["ai_output_tokens"]
    assert await command("replay", "--all") == (0, "1 replayed\n", "")
    await bench.settled_down(bench.hand())
    assert await command("replay", "--all") == (0, "0 replayed\n", "")


async def test_a_dropped_one_is_forgotten_and_no_longer_counts(bench, command, letters):
    letter = letters["ai_output_tokens"]
    assert await command("drop", letter.letter_id, letter.letter_id) == (0, "1 dropped\n", "")
    assert (await bench.owed(letter.external_id))["ai_output_tokens"] == [0, 0, 0]
    assert (await bench.view(letter.external_id)).limits[2].used == 0
    assert await bench.unaccounted() == 0


@pytest.mark.parametrize("action", ["show", "replay", "drop"])
async def test_an_unknown_id_is_exit_1_and_named_and_the_others_are_done(bench, command, letters, action):
    known = [] if action == "show" else [letters["ai_requests"].letter_id]
    code, _, complaint = await command(action, "nonsense", *known)
    assert (code, complaint) == (1, "no such dead letter: nonsense\n")
    assert len(await bench.queue.dead_letters()) == 3 - len(known)


async def test_a_replay_that_is_cut_short_and_given_again_loses_and_doubles_nothing(bench, command, letters):
    """Redis goes away after the second of three, whose reply is lost."""
    bury, count = bench.queue.replay, 0

    async def cut_short(letter):
        nonlocal count
        count += 1
        done = await bury(letter)
        if count == 2:
            raise RedisOutcomeUnknown("no reply in time")
        return done

    bench.queue.replay = cut_short
    with pytest.raises(RedisOutcomeUnknown):
        await command("replay", "--all")
    assert await command("replay", *(letter.letter_id for letter in letters.values())) == (
        1,
        "1 replayed\n",
        f"no such dead letter: {', '.join(one.letter_id for one in list(letters.values())[:2])}\n",
    )
    await bench.settled_down(bench.hand())
    assert await bench.queue.dead_letters() == []


@pytest.mark.parametrize(
    "words", [[], ["list", "--xml"], ["show"], ["replay"], ["drop"], ["drop", "--all"], ["replay", "--all", "x"], ["x"]]
)
def test_a_command_that_makes_no_sense_is_exit_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        dead_letters.parser().parse_args(["dead-letters", *words])
    assert ended.value.code == 2
    assert re.search("^usage: sentinel-usage-worker .*dead-letters", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("environ", "code", "says"),
    [({"ZION_API_KEY": ""}, 2, "ZION_API_KEY"), ({"ZION_API_KEY": "key"}, 1, "redis")],
)
def test_wrong_settings_are_exit_2_and_a_redis_that_is_away_is_exit_1_in_one_line(environ, code, says):
    told = {"ZION_API_URL": "http://127.0.0.1:9", "REDIS_URL": f"redis://127.0.0.1:{free_port()}", **environ}
    command = [script("sentinel-usage-worker"), "dead-letters", "list"]
    ended = subprocess.run(command, env=bare_environ(**told), capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == code
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert says.lower() in ended.stderr.lower()
