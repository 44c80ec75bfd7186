"""The queue and the prefixes: what is computed once, what is answered together, and what a failure costs."""

import math
import queue
import threading
import time
from dataclasses import replace

import pytest
import torch
from askable import QUESTIONS, SHORT, TOKENS, predictor, row

from photon_train.answering.generation import AnswerSettings
from photon_train.answering.request import group_rows
from photon_train.prefix import PrefixCache, bytes_of
from photon_train.serving.engine import Engine
from photon_train.serving.question import Answer, Busy, Closing, Draft, Failure, Piece, Question, Text

WAIT_S = 60


class Asked:
    """A question, and what comes back."""

    def __init__(self, engine, question):
        self.events = queue.Queue()
        self.ticket = engine.submit(question, self.events.put)

    def all(self):
        found = [self.events.get(timeout=WAIT_S)]
        while isinstance(found[-1], Piece):
            found.append(self.events.get(timeout=WAIT_S))
        return found

    def answer(self):
        found = self.all()[-1]
        assert isinstance(found, Answer), found
        return found


class Held:
    """An engine whose thread is held while questions are asked, so that a test says what waits together."""

    def __init__(self, engine):
        self.engine, self.released, self.reached = engine, threading.Event(), threading.Event()
        self.real = engine._next
        engine._next = self.next

    def next(self):
        self.reached.set()
        assert self.released.wait(WAIT_S)
        return self.real()

    def __enter__(self):
        Asked(self.engine, text_question("hold"))  # the thread is in the real one already; this leads it to ours
        assert self.reached.wait(WAIT_S)

    def __exit__(self, *_):
        self.released.set()


def text_question(text):
    return Question(row("t", text), max_tokens=1)


def about(place, text, **more):
    return Question(row("x", text, place), (f"content of {place}",), **{"max_tokens": 6} | more)


@pytest.fixture
def engine(model_dir):
    engine = Engine(predictor(model_dir), cache_bytes=1 << 30)
    yield engine
    engine.close(WAIT_S)


def predicted(model_dir, rows, settings=SHORT):
    """What `photon predict` says to the rows: {id: Prediction}."""
    model = predictor(model_dir, settings)
    found = {}
    for group in group_rows(rows, model.processor)[0]:
        encoded = model.encode(group)
        found |= {reply.prediction.id: reply.prediction for reply in model.answer(encoded, group.requests)}
    return found


def counted(engine):
    """Counts, while it works: runs of the vision tower, and for each pass of the lowest layer its rows and tokens."""
    model, towers, lowest = engine.predictor.model, [], []
    model.model.visual.register_forward_hook(lambda *_: towers.append(1))
    model.model.language_model.layers[0].register_forward_hook(
        lambda module, args, kwargs, out: lowest.append(tuple(out.shape[:2])), with_kwargs=True
    )
    return towers, lowest


def test_a_cached_volume_is_not_read_nor_encoded_again_and_answers_are_those_of_predict(
    engine, model_dir, places, monkeypatch
):
    rows = {q: row(q, q, places[0]) for q in QUESTIONS}
    expected = predicted(model_dir, list(rows.values()))
    towers, lowest = counted(engine)
    first = Asked(engine, about(places[0], QUESTIONS[0])).answer()
    assert len(towers) == 1 and first.cached_tokens == 0 and engine.predictor.encodings == 1
    prefix_length = max(length for _, length in lowest)
    assert prefix_length > TOKENS
    monkeypatch.setattr(engine.predictor, "encode", lambda group: pytest.fail("encoded again"))
    lowest.clear()
    for question in QUESTIONS:
        found = Asked(engine, about(places[0], question)).answer()
        same = expected[question]
        assert (found.texts[0].text, found.prediction.kept) == (same.response, same.kept)
        assert found.prediction.threshold == pytest.approx(same.threshold)
        assert found.cached_tokens == prefix_length
        assert found.keep_V.sum() == found.prediction.kept_tokens == same.kept_tokens
    assert len(towers) == 1
    assert all(length < 80 for _, length in lowest)  # of the volume's tokens none: questions are short


def test_questions_that_wait_for_one_volume_are_one_batch_and_volumes_take_turns(engine, places):
    _, lowest = counted(engine)
    finished = []
    with Held(engine):
        lowest.clear()
        for n in range(20):
            engine.submit(
                about(places[0], f"Is there a nodule in slab {n}?"), lambda event, n=n: finished.append(("a", n))
            )
        for name, place in (("b", places[1]), ("c", places[2])):
            engine.submit(about(place, QUESTIONS[0]), lambda event, name=name: finished.append((name, 0)))
    deadline = time.monotonic() + WAIT_S
    while len(finished) < 22:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Sixteen at most are a batch: four of the first volume, which is encoded, join the one whose turn is next.
    assert [name for name, _ in finished] == ["a"] * 16 + ["b"] + ["a"] * 4 + ["c"]
    assert [n for name, n in finished if name == "a"] == list(range(20))
    rows = [count for count, length in lowest if length > 1]  # passes over more than one token: prefixes, prompts
    assert rows == [1, 16, 1, 5, 1, 1]


def test_questions_on_volumes_that_are_encoded_share_a_batch_and_are_answered_as_by_predict(engine, model_dir, places):
    for place in places[:3]:
        Asked(engine, about(place, "Warm")).answer()
    texts = {(v, q): f"{QUESTIONS[q]} {v}" for v in range(3) for q in range(2)}
    rows = {key: row(f"{key}", text, places[key[0]]) for key, text in texts.items()}
    expected = predicted(model_dir, list(rows.values()))
    drawing = AnswerSettings(max_new_tokens=6, sample=True, temperature=2.0, seed=7)
    drawn_alone = predicted(model_dir, [row("q1", QUESTIONS[0], places[1])], drawing)["q1"]
    before, (_, lowest) = engine.predictor.encodings, counted(engine)
    with Held(engine):
        lowest.clear()
        asked = {key: Asked(engine, about(places[key[0]], text, streams=key[1] > 0)) for key, text in texts.items()}
        drawn = Asked(engine, about(places[1], QUESTIONS[0], temperature=2.0, seed=7))
        gone = Asked(engine, about(places[2], QUESTIONS[3]))
        lost = Asked(engine, about("/lost.ome.zarr", QUESTIONS[0]))
        anew = Asked(engine, about(places[3], QUESTIONS[0]))
        gone.ticket.cancel()
    for key, one in asked.items():
        *pieces, answer = one.all()
        same = expected[f"{key}"]
        assert (answer.texts[0].text, answer.prediction.kept) == (same.response, same.kept)
        assert answer.prediction.threshold == pytest.approx(same.threshold)
        assert "".join(piece.text for piece in pieces) == (same.response if key[1] else "")
        assert answer.cached_tokens > TOKENS
    assert drawn.answer().texts[0].text == drawn_alone.response
    assert isinstance(lost.all()[-1], Failure) and anew.answer().cached_tokens == 0 and gone.events.empty()
    assert engine.predictor.encodings == before + 1
    # Six together, the one that is drawn, the new volume and its question.
    assert [count for count, length in lowest if length > 1] == [6, 1, 1, 1]
    assert not any(entry.users for entry in engine.prefixes._entries.values())


def test_a_volume_that_is_lost_while_its_question_joins_a_batch_costs_itself(engine, places, monkeypatch):
    for place in places[:2]:
        Asked(engine, about(place, "Warm")).answer()
    join, gone = engine._join, f"content of {places[1]}"

    def join_then_lose(tickets):
        join(tickets)
        engine.forget(gone)

    monkeypatch.setattr(engine, "_join", join_then_lose)
    with Held(engine):
        first = Asked(engine, about(places[0], QUESTIONS[0]))
        lost = Asked(engine, replace(about("/lost.ome.zarr", QUESTIONS[1]), contents=(gone,)))
        last = Asked(engine, about(places[0], QUESTIONS[2]))
    assert isinstance(lost.all()[-1], Failure)
    assert first.answer().texts[0].text and last.answer().texts[0].text
    assert engine.figures()["batches"] == 4  # two to warm, that of the one that held the engine, and one for all


def test_other_text_before_a_volume_or_other_content_under_its_name_is_encoded_anew(engine, places):
    Asked(engine, about(places[0], QUESTIONS[0])).answer()
    assert engine.prefixes.misses == 1
    strict = Question(row("x", QUESTIONS[0], places[0], system="Be brief."), (f"content of {places[0]}",), 6)
    Asked(engine, strict).answer()
    Asked(engine, replace(about(places[0], QUESTIONS[0]), contents=("another content",))).answer()
    assert engine.prefixes.misses == 3
    moved = replace(about(places[1], QUESTIONS[0]), contents=(f"content of {places[0]}",))  # the same under a new name
    Asked(engine, moved).answer()
    assert (engine.prefixes.misses, engine.prefixes.hits) == (3, 1)


def test_text_alone_and_two_volumes_are_answered_as_by_predict(engine, model_dir, places):
    rows = [row("t", "What is a nodule?"), row("two", QUESTIONS[0], places[0], places[1])]
    expected = predicted(model_dir, rows)
    assert Asked(engine, Question(rows[0], (), 6)).answer().texts[0].text == expected["t"].response
    two = Asked(engine, Question(rows[1], ("a", "b"), 6)).answer()
    assert (two.texts[0].text, two.prediction.kept) == (expected["two"].response, expected["two"].kept)
    assert len(two.keep_V) == 2 * TOKENS


def test_two_volumes_behind_another_system_message_or_first_turn_are_encoded_anew_and_answered_as_by_predict(
    engine, model_dir, places
):
    rows = [row(name, QUESTIONS[0], *places[:2], system=name) for name in ("Be brief.", "Name every lobe.")]
    for name, first in (("left", "The left side first."), ("right", "The right side first.")):
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": "Yes."}]
        rows.append({**rows[0], "id": name, "messages": [*turns, rows[0]["messages"][-1]]})
    expected = predicted(model_dir, rows)
    assert len({one.response for one in expected.values()}) == 4
    for count, one in enumerate(rows, start=1):
        found = Asked(engine, Question(one, ("a", "b"), 6)).answer()
        same = expected[one["id"]]
        assert (found.texts[0].text, found.prediction.kept) == (same.response, same.kept)
        assert (engine.prefixes.misses, found.cached_tokens) == (count, 0)


@pytest.mark.parametrize("stop", [(), ("e",), ("zzz",)])
def test_pieces_add_up_to_the_answer_whatever_its_bytes(engine, places, stop):
    for question in QUESTIONS:
        for more in ({}, {"temperature": 3.0, "answers": 3, "seed": 5}):
            asked = about(places[0], question, max_tokens=60, streams=True, stop=stop, logprobs=2, **more)
            *pieces, answer = Asked(engine, asked).all()
            for index, text in enumerate(answer.texts):
                own = [piece for piece in pieces if piece.number == index]
                assert "".join(piece.text for piece in own) == text.text
                assert [score for piece in own for score in piece.scores] == list(text.scores)
                assert len(text.scores) == text.tokens <= 60
                assert not any(one in text.text for one in stop)
                assert text.finish == "stop" or (text.finish, text.tokens) == ("length", 60)


def test_an_answer_ends_before_a_stop_text_and_after_max_tokens(engine, model_dir, places):
    whole = predicted(model_dir, [row("x", QUESTIONS[1], places[0])], AnswerSettings(max_new_tokens=40))["x"].response
    assert len(set(whole)) > 5
    stop = whole[7:9]
    found = Asked(engine, about(places[0], QUESTIONS[1], max_tokens=40, stop=(stop, "no such text"))).answer().texts[0]
    assert (found.text, found.finish) == (whole[: whole.index(stop)], "stop")
    with Held(engine):  # each in a batch has its own end
        several = [Asked(engine, about(places[0], QUESTIONS[1], max_tokens=n)) for n in (1, 5, 40, 3)]
    texts = [one.answer().texts[0] for one in several]
    assert [text.tokens for text in texts] == [1, 5, 40, 3]
    assert all(text.finish == "length" for text in texts)
    assert texts[2].text == whole


class Bytes:
    """A tokenizer whose tokens are bytes, and the number of times that it decodes."""

    decoded = 0

    def decode(self, tokens, skip_special_tokens):
        self.decoded += 1
        return bytes(tokens).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("said", "whole", "tokens"),
    [("aé|b", "aé", 3), ("é|", "é", 2), ("|", "", 0), ("aé", "aé", 3)],
)
def test_a_letter_of_several_tokens_before_a_stop_text_stays_whole_and_an_answer_is_decoded_once_a_token(
    said, whole, tokens
):
    tokenizer, pieces = Bytes(), []
    question = Question(row("x", "?"), stop=("|", "no such text"), streams=True)
    draft = Draft(0, question, tokenizer, {0}, pieces.append, lambda: False)
    for count, token in enumerate([*said.encode(), 0], start=1):
        draft.add(token, None)
        if draft.finish:
            break
        assert tokenizer.decoded == count
    assert draft.text() == Text(whole, "stop", tokens, ())
    assert "".join(piece.text for piece in pieces) == whole


def test_drawn_answers_are_those_of_predict_with_the_same_seed(engine, model_dir, places):
    settings = AnswerSettings(max_new_tokens=6, sample=True, temperature=2.0, top_p=0.9, seed=7)
    expected = predicted(model_dir, [row(f"q{n}", QUESTIONS[0], places[0]) for n in (1, 2, 3)], settings)
    asked = about(places[0], QUESTIONS[0], temperature=2.0, top_p=0.9, seed=7, answers=3)
    with Held(engine):
        drawn, other = Asked(engine, asked), Asked(engine, about(places[0], QUESTIONS[1]))
    assert [text.text for text in drawn.answer().texts] == [expected[f"q{n}"].response for n in (1, 2, 3)]
    other.answer()


def test_log_probabilities_are_those_of_the_model(engine, places):
    answer = Asked(engine, about(places[0], QUESTIONS[0], logprobs=3)).answer()
    model = engine.predictor
    inputs = model.processor(rows=[row("x", QUESTIONS[0], places[0])])
    out = model.model.generate(
        **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    expected = [logits[0].log_softmax(-1).max().item() for logits in out.logits]
    scores = answer.texts[0].scores
    assert [score.logprob for score in scores] == pytest.approx(expected[: len(scores)], abs=1e-4)
    assert all(score.others[0] == (score.text, score.logprob) and len(score.others) == 3 for score in scores)
    warm = Asked(engine, about(places[0], QUESTIONS[0], logprobs=0, temperature=5.0, seed=1)).answer().texts[0].scores
    first = out.logits[0][0].log_softmax(-1)
    assert min((first - warm[0].logprob).abs()) < 1e-4 and warm[0].others == ()


def test_a_question_that_fails_costs_itself(engine, model_dir, places, monkeypatch):
    real = type(engine.predictor).answer

    def answer(self, encoded, requests, *args, **kwargs):
        if any("crash" in request.row["messages"][0]["content"] for request in requests):
            raise RuntimeError("Doe^John")
        return real(self, encoded, requests, *args, **kwargs)

    monkeypatch.setattr(type(engine.predictor), "answer", answer)
    with Held(engine):
        good = [Asked(engine, about(places[0], question)) for question in QUESTIONS[:2]]
        bad = Asked(engine, about(places[0], "crash"))
        lost = Asked(engine, about("/secret/lost.ome.zarr", QUESTIONS[0]))
        more = Asked(engine, about(places[1], QUESTIONS[2]))
    failure = bad.all()[-1]
    assert isinstance(failure, Failure) and not failure.is_of_question
    assert "RuntimeError" in failure.reason and "Doe" not in failure.reason
    gone = lost.all()[-1]
    assert isinstance(gone, Failure) and gone.is_of_question and "/secret" not in gone.reason
    expected = predicted(model_dir, [row(q, q, places[0]) for q in QUESTIONS[:2]])
    assert [one.answer().texts[0].text for one in good] == [expected[q].response for q in QUESTIONS[:2]]
    more.answer()
    with pytest.raises(ValueError, match="expected a question"):
        Asked(engine, about(places[0], " "))
    with pytest.raises(ValueError, match="expected plain text"):
        Asked(engine, about(places[0], "<|im_end|>"))


def test_an_answer_whose_logits_are_not_finite_is_a_failure_without_text_and_costs_itself(engine, places):
    def diverged(module, args, logits):
        logits[-1] = math.nan  # of the last row of a batch
        return logits

    engine.predictor.model.lm_head.register_forward_hook(diverged)
    with Held(engine):
        good, *bad = (Asked(engine, about(places[0], question, streams=True)) for question in QUESTIONS[:2])
        bad.append(Asked(engine, about(places[0], QUESTIONS[0], temperature=2.0, answers=2, seed=1)))
    assert good.answer().texts[0].text
    for one in bad:
        (failure,) = one.all()
        assert isinstance(failure, Failure) and "expected finite logits" in failure.reason
        assert not failure.is_of_question
    assert engine.figures()["failed"] == 3  # and the question that held the engine


def test_a_batch_that_memory_does_not_suffice_for_is_halved(engine, places, monkeypatch):
    real, sizes = type(engine.predictor).answer, []

    def answer(self, encoded, requests, *args, **kwargs):
        sizes.append(len(requests))
        if len(requests) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(self, encoded, requests, *args, **kwargs)

    with Held(engine):
        monkeypatch.setattr(type(engine.predictor), "answer", answer)
        asked = [Asked(engine, about(places[0], f"{QUESTIONS[0]} {n}")) for n in range(5)]
    assert all(one.answer() for one in asked)
    assert sizes == [5, 3, 2, 1, 2]


def test_a_closing_engine_whose_time_is_up_fails_what_it_answers_and_leaves_no_thread(model_dir, places):
    engine = Engine(predictor(model_dir), cache_bytes=1 << 30)
    first = Asked(engine, about(places[0], QUESTIONS[0], max_tokens=100_000, streams=True))
    first.events.get(timeout=WAIT_S)  # it is being answered, for an hour
    second = Asked(engine, about(places[1], QUESTIONS[0]))
    assert engine.close(0) == 2
    assert not engine._thread.is_alive()
    assert all(isinstance(one.all()[-1], Failure) for one in (first, second))


def test_memory_that_runs_out_takes_other_prefixes_before_an_answer(engine, places, monkeypatch):
    Asked(engine, about(places[1], QUESTIONS[0])).answer()
    real, tries = type(engine.predictor).answer, []

    def answer(self, encoded, requests, *args, **kwargs):
        tries.append(len(engine.prefixes))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("no room")
        return real(self, encoded, requests, *args, **kwargs)

    monkeypatch.setattr(type(engine.predictor), "answer", answer)
    Asked(engine, about(places[0], QUESTIONS[0])).answer()
    assert tries == [2, 1]


def test_a_client_that_goes_away_frees_its_place_and_ends_its_answer(engine, places):
    with Held(engine):
        first, second = (Asked(engine, about(places[0], question)) for question in QUESTIONS[:2])
        first.ticket.cancel()
        assert engine.figures()["waiting"] == 1
    second.answer()
    assert first.events.empty()
    long = Asked(engine, about(places[0], QUESTIONS[0], max_tokens=100_000, streams=True))
    long.events.get(timeout=WAIT_S)
    long.ticket.cancel()
    Asked(engine, about(places[0], QUESTIONS[1])).answer()  # at once: 100,000 tokens would take an hour
    assert engine.figures()["left"] == 2


def test_a_full_queue_turns_away_and_a_closing_engine_answers_what_waits(model_dir, places):
    engine = Engine(predictor(model_dir), cache_bytes=1 << 30, max_waiting=3)
    with Held(engine):
        waiting = [Asked(engine, about(places[0], QUESTIONS[0])) for _ in range(3)]
        with pytest.raises(Busy) as busy:
            Asked(engine, about(places[1], QUESTIONS[0]))
        assert busy.value.retry_after_s >= 1
    threading.Thread(target=engine.close).start()
    assert all(one.answer() for one in waiting)
    engine._thread.join(WAIT_S)
    with pytest.raises(Closing):
        Asked(engine, about(places[0], QUESTIONS[0]))


def prefix(model, place):
    return model.encode(group_rows([row("x", "?", place)], model.processor)[0][0]).prefix


def test_prefixes_are_bounded_in_bytes_oldest_first_but_not_while_in_use(model_dir, places):
    model = predictor(model_dir)
    made = {name: prefix(model, place) for name, place in zip("abcd", places, strict=True)}
    size = bytes_of(made["a"])
    layers, tokens = model.model.config.its_layer + 1, made["a"].length
    # keys and values of each lower layer; hidden states, queries and keys of the last; ids (int64); shares; the grid
    assert size == tokens * (4 * 64 * (2 * layers + 3) + 8 + 4) + 3 * 8 + 4
    cache = PrefixCache(2 * size)

    def use(name):
        with cache.pinned(name, lambda: made[name]) as found:
            assert found is made[name]

    for name in "abac":  # a is used again, so b is the oldest
        use(name)
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)
    assert (cache.hits, cache.misses, cache.evictions, cache.bytes) == (1, 3, 1, 2 * size)
    with cache.pinned("a", lambda: made["a"]):
        for name in "bd":
            use(name)
        assert "a" in cache and cache.bytes == 2 * size
        cache.forget(lambda key: key == "a")
        assert "a" in cache
        assert cache.clear() == size
    assert "a" not in cache and cache.bytes == len(cache) == 0
    with pytest.raises(OSError), cache.pinned("a", lambda: (_ for _ in ()).throw(OSError("unreadable"))):
        pass
    assert len(cache) == 0

    def encode_and_delete():
        cache.forget(lambda key: key == "a")
        return made["a"]

    with cache.pinned("a", encode_and_delete):
        assert cache.bytes == size
    assert "a" not in cache and cache.bytes == 0
    small = PrefixCache(size - 1)
    with small.pinned("a", lambda: made["a"]):
        assert len(small) == 1
    assert len(small) == small.bytes == 0
