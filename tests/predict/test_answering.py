"""Questions on one volume: encoded once, answered as each would be alone."""

import math

import pytest
import torch
from askable import QUESTIONS, TOKENS, blocks, predictor, row

from photon_train.answering.generation import AnswerSettings, score_choices
from photon_train.answering.predictor import answer_questions
from photon_train.answering.request import Request, answer_ids, group_rows
from photon_train.rows import unpack_mask


def answered(model, rows):
    """Replies by id, and the group of each."""
    groups, problems = group_rows(rows, model.processor)
    assert not problems
    replies = {}
    for group in groups:
        encoded = model.encode(group)
        replies |= {reply.prediction.id: reply for reply in model.answer(encoded, group.requests)}
    return replies


def alone(model, one):
    """The text and keep mask of one row, by the processor and the model themselves."""
    inputs = model.processor(rows=[one])
    ids = model.model.generate(**inputs, max_new_tokens=model.settings.max_new_tokens, do_sample=False)
    with torch.no_grad():
        scheduled = model.model(**inputs).scheduled
    visual = inputs["input_ids"][0] == model.model.config.video_token_id
    keep = None if scheduled is None else scheduled.keep_BL[0][visual].numpy()
    return model.processor.decode(ids[:, inputs["input_ids"].shape[1] :])[0], keep, int((~visual).sum())


def test_questions_of_one_volume_are_answered_as_alone_and_the_volume_is_encoded_once(model):
    volume, towers = blocks(1), []
    model.model.model.visual.register_forward_hook(lambda *_: towers.append(1))
    rows = [row(f"r{i}", question, volume) for i, question in enumerate(QUESTIONS)]
    replies = answered(model, rows)
    assert model.encodings == len(towers) == 1
    for one in rows:
        text, keep, text_tokens = alone(model, one)
        found = replies[one["id"]].prediction
        assert found.response == text
        assert (unpack_mask(found.kept, found.visual_tokens) == keep).all()
        assert (found.kept_tokens, found.visual_tokens, found.text_tokens) == (keep.sum(), TOKENS, text_tokens)
        assert found.scheduler == "its" and 0 < found.threshold < 0.9
    assert len({reply.prediction.response for reply in replies.values()}) > 1
    assert len({reply.prediction.kept for reply in replies.values()}) == len(rows)


def test_two_volumes_text_alone_and_another_system_message_share_nothing_they_must_not(model):
    a, b = blocks(1), blocks(2)
    rows = [
        row("both", QUESTIONS[0], a, b),
        row("first", QUESTIONS[0], a),
        row("strict", QUESTIONS[0], a, system="Answer in one word."),
        row("text", "What is a nodule?"),
        row("words", "What is an effusion, and how much of it is normal?"),
        {**row("late", "", a), "messages": [{"role": "user", "content": "Look at this: <video> Is there a nodule?"}]},
    ]
    replies = answered(model, rows)
    assert model.encodings == 4
    for one in rows:
        text, keep, text_tokens = alone(model, one)
        found = replies[one["id"]].prediction
        assert (found.response, found.text_tokens) == (text, text_tokens), one["id"]
        assert found.visual_tokens == TOKENS * len(one["videos"])
        assert found.kept == ("" if keep is None else replies[one["id"]].prediction.kept)
        assert keep is None or (replies[one["id"]].keep_V == keep).all()


def test_the_given_answer_is_never_part_of_the_prompt(model):
    volume = blocks(1)
    with_answer, without = row("a", QUESTIONS[0], volume, answer="No nodule."), row("b", QUESTIONS[0], volume)
    replies = answered(model, [with_answer, without])
    assert replies["a"].prediction.response == replies["b"].prediction.response
    training = model.processor(rows=[with_answer], for_training=True)["input_ids"][0]
    prompt = group_rows([with_answer], model.processor)[0][0].requests[0]
    answer = answer_ids(prompt, "No nodule.", model.processor)
    line_end = len(training) - 1  # behind the end marker
    assert torch.cat([prompt.suffix_L, answer]).equal(
        training[line_end - len(prompt.suffix_L) - len(answer) : line_end]
    )


def test_a_follow_up_turn_and_its_earlier_answers_stay_in_the_prompt(model):
    volume = blocks(1)
    one = row("turns", QUESTIONS[0], volume, answer="Yes.")
    one["messages"] += [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    asked = {**one, "messages": one["messages"][:3]}
    assert answered(model, [one])["turns"].prediction.response == alone(model, asked)[0]


@pytest.mark.parametrize("scheduler", ["none", "random", "uniform", "foreground"])
def test_every_scheduler_says_what_it_kept(model_dir, scheduler):
    model = predictor(model_dir, scheduler=scheduler, keep_ratio=0.4)
    reply = answered(model, [row("r", QUESTIONS[0], blocks(1))])["r"].prediction
    assert (reply.kept_tokens, reply.threshold) == (TOKENS if scheduler == "none" else 50, None)


def test_choices_have_the_probabilities_that_generation_gives_them(model_dir):
    model = predictor(model_dir, AnswerSettings(choices=True))
    choices = ["Yes", "No", "It cannot be said"]
    rows = [row("q", QUESTIONS[0], blocks(1), choices=choices), row("t", "Is water wet?", choices=choices[:2])]
    replies = answered(model, rows)
    for one in rows:
        prompt = group_rows([one], model.processor)[0][0].requests[0]
        found = replies[one["id"]].prediction
        assert found.choice_scores == pytest.approx(
            {c: forced(model, one, prompt, c) for c in one["choices"]}, abs=1e-4
        )
        assert found.response == max(found.choice_scores, key=found.choice_scores.get)
        assert all(score < 0 for score in found.choice_scores.values())
    assert 0 < replies["q"].prediction.kept_tokens < TOKENS


def forced(model, one, prompt: Request, text: str) -> float:
    """Log-probability of an answer, by generating it token by token against the model's will."""
    answer = answer_ids(prompt, text, model.processor).tolist()
    inputs = model.processor(rows=[one])
    length = inputs["input_ids"].shape[1]
    out = model.model.generate(
        **inputs,
        max_new_tokens=len(answer),
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, ids: [answer[len(ids) - length]],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.sequences[0, length:].tolist() == answer
    return sum(float(logits[0].log_softmax(-1)[token]) for logits, token in zip(out.logits, answer, strict=True))


def test_an_answer_of_the_end_marker_alone_is_scored(model):
    (group,), _ = group_rows([row("q", QUESTIONS[0], blocks(1))], model.processor)
    encoded = model.encode(group)
    end = torch.tensor([model.model.config.im_end_token_id])
    inputs = encoded.prefix.followed_by([group.requests[0].suffix_L])
    (((score,),),), _ = score_choices(model.model, inputs, [[end]])
    assert math.isfinite(score) and score < 0


def test_a_row_without_choices_is_answered_in_words(model_dir):
    model = predictor(model_dir, AnswerSettings(max_new_tokens=6, choices=True))
    volume = blocks(1)
    replies = answered(
        model, [row("open", QUESTIONS[0], volume), row("closed", QUESTIONS[1], volume, choices=["A", "B"])]
    )
    assert replies["open"].prediction.choice_scores == {}
    assert replies["closed"].prediction.response in ("A", "B")
    assert model.encodings == 1


def test_drawn_answers_depend_on_the_seed_and_on_nothing_that_ran_before(model_dir):
    def drawn(seed):
        model = predictor(model_dir, AnswerSettings(max_new_tokens=6, sample=True, temperature=2.0, seed=seed))
        torch.rand(seed + 1)
        return answered(model, [row("r", QUESTIONS[0], blocks(1))])["r"].prediction.response

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_more_than_nine_questions_are_streamed_in_their_order(model):
    questions, prompts, starts = [f"Is there a nodule in slab {n}?" for n in range(1, 12)], [], [True]

    class Streamer:
        def put(self, ids):
            if starts.pop():
                prompts.append(model.processor.tokenizer.decode(ids.flatten()))
            starts.append(False)

        def end(self):
            starts[:] = [True]

    replies, _ = answer_questions(model, questions, [blocks(1)], "a", {"read": 0.0, "prepare": 0.0}, Streamer())
    assert [reply.prediction.id for reply in replies] == [f"q{n}" for n in range(1, 12)]
    assert len(prompts) == 11
    assert all(question in prompt for question, prompt in zip(questions, prompts, strict=True))
