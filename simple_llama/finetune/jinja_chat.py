"""Chats in the format of a model's own Jinja template: the ids of transformers' `apply_chat_template`, but where a
message would forge structure.

The prompt is what the model sees when it answers, and what the template puts before every answer, if that is more than
white space. Scored are the answer and the first token of the template's behind it; what follows that is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from simple_llama.common.errors import UserError
from simple_llama.common.files import digest, json_bytes, shown
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.dataset.tokenizer import decode_text
from simple_llama.finetune.chat_format import Chat, EncodedChat, UnsayableChat
from simple_llama.finetune.piece_tokenizer import PieceIds, PieceTokenizer
from simple_llama.finetune.skeleton import Pieces, Skeleton, Token, align, placeholder, read_skeleton, written
from simple_llama.finetune.templates import Messages, Rendering, TemplateRenderer

TEMPLATE_KEY = "chat_template"
_CUT = "messages spell tokens of the tokenizer, and are read as text"
_PLAIN = "messages spell what the chat template marks turns with, which is plain text: nothing can keep them apart"
_APART = "the tokens of a whole chat do not begin with those of its prompt, so the answer is tokenized apart"
_STRIPPED = "the chat template takes white space from the ends of messages"


def template_digest(template: str) -> str:
    """What a format's identity says of its template, under TEMPLATE_KEY."""
    return digest(template.encode()).hex()


class _Form(NamedTuple):
    """What a template writes around the messages of chats with so many turns."""

    prompt: Skeleton  # up to where the last answer begins
    wholes: tuple[Skeleton, Skeleton]  # with the last answer; the second is for an answer that brings its own front
    has_front: bool  # the whole chat has more than white space in front of its last answer that the prompt lacks
    plain_marks: frozenset[str]


class JinjaChat:
    """A ChatFormat over a template and its tokenizer.

    Args:
        own: with a template.
        system: the system message of chats that have none of their own; None: none.
        given: what else the template reads (`chat_template_kwargs`).
        score_tail: also score what the template puts behind the end of an answer.

    Raises UserError for a template that cannot be used, with the way out.
    """

    def __init__(
        self,
        own: OwnTokenizer,
        system: str | None = None,
        given: Mapping[str, Any] | None = None,
        *,
        score_tail: bool = False,
    ):
        assert own.template is not None
        if any("\ud800" <= character <= "\udfff" for character in own.template):
            raise UserError(f"{own.source}: expected a chat template of Unicode text, found half of a surrogate pair")
        self.tokenizer: Tokenizer = own.tokenizer
        self.default_system, self.unknown_id, self._source = system, own.unknown_id, own.source
        self.identity = {TEMPLATE_KEY: template_digest(own.template)}
        if given:
            self.identity["chat_template_kwargs"] = json_bytes(dict(sorted(given.items()))).decode()
        self._score_tail = score_tail
        self._pieces = PieceTokenizer(own.tokenizer, own.unknown_id)
        self._renderer = TemplateRenderer(own.template, own.named, given or {}, own.source)
        self._bos = own.tokenizer.token_to_id(own.named.get("bos_token", ""))
        self._forms: dict[tuple[bool, int], _Form] = {}
        end = _tokens(self._form(Chat(system, [""], [""])).wholes[0].segments[-1:])[0]
        self.stop_ids = own.stop_ids | {end.id}

    def encode(self, chats: Sequence[Chat]) -> list[EncodedChat]:
        """Token ids of whole chats. UnsayableChat for one that the template cannot say, or would change."""
        prompts = list(dict.fromkeys(Chat(c.system, tuple(c.users), tuple(c.assistants[:-1])) for c in chats))
        rendered = self._renderer.render(
            [(_messages(c), False) for c in chats] + [(_messages(p), True) for p in prompts]
        )
        rendered_prompts = dict(zip(prompts, rendered[len(chats) :], strict=True))
        wholes, starts = [], []
        for number, (chat, rendering) in enumerate(zip(chats, rendered, strict=False)):
            prompt = Chat(chat.system, tuple(chat.users), tuple(chat.assistants[:-1]))
            with _naming(number):
                form = self._form(chat)
                whole = self._aligned(form.wholes, rendering, chat)
                start = whole.up_to_last_message
                if not form.has_front:
                    start = self._aligned([form.prompt], rendered_prompts[prompt], prompt)
            wholes.append(whole)
            starts.append(start)
        different = list(dict.fromkeys((*wholes, *starts)))
        ids = dict(zip(different, self._pieces.encode(different), strict=True))
        return [
            self._joined(chat, whole, ids[whole], ids[start].ids)
            for chat, whole, start in zip(chats, wholes, starts, strict=True)
        ]

    def encode_prompt(self, chat: Chat) -> list[int]:
        """Token ids up to where the next answer begins. UserError as of `encode`."""
        form = self._form(chat)
        if form.has_front:
            chat = chat._replace(assistants=[*chat.assistants, placeholder(0)])
            pieces = self._aligned(form.wholes[:1], self._rendered(chat, False), chat).up_to_last_message
        else:
            pieces = self._aligned([form.prompt], self._rendered(chat, True), chat)
        [found] = self._pieces.encode([pieces])
        return found.ids

    def show(self, chat: Chat) -> str:
        """The chat as the template writes it. UserError where it refuses it."""
        rendering = self._rendered(chat, len(chat.users) > len(chat.assistants))
        if rendering.error:
            raise self._refused(rendering)
        return rendering.text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens."""
        return decode_text(self.tokenizer, ids).strip()

    def spell(self, ids: Sequence[int]) -> str:
        """Text of a chat's ids, special tokens among them."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def _joined(self, chat: Chat, whole: Pieces, ids: PieceIds, prompt_ids: list[int]) -> EncodedChat:
        """A chat's ids from those of its prompt and of the whole."""
        notes = [_CUT] if ids.is_cut else []
        start, at = len(prompt_ids), ids.at[len(_tokens(whole.segments[:-1]))]
        found = ids.ids
        if found[:start] != prompt_ids or at < start:
            behind_a_token = prompt_ids[-1] in self._pieces.structure
            answer = self._pieces.cut(whole.last_message, "token" if behind_a_token else "text")
            found, at = prompt_ids + answer.ids, start + answer.at[0]
            notes.append(_APART)
        if not self._score_tail:
            found = found[: at + 1]
        said = [message["content"] for message in _messages(chat)]
        if list(whole.messages) != said and sorted(whole.messages) != sorted(said):
            notes.append(_STRIPPED)
        if any(mark in text for mark in self._form(chat).plain_marks for text in said):
            notes.append(_PLAIN)
        return EncodedChat(found, len(found) - start, tuple(notes))

    def _rendered(self, chat: Chat, asked: bool) -> Rendering:
        """One rendering."""
        [rendering] = self._renderer.render([(_messages(chat), asked)])
        return rendering

    def _aligned(self, skeletons: Sequence[Skeleton], rendering: Rendering, chat: Chat) -> Pieces:
        """The pieces of a rendering by the first skeleton that fits."""
        if rendering.error:
            raise self._refused(rendering)
        messages = [message["content"] for message in _messages(chat)]
        for skeleton in skeletons:
            if pieces := align(skeleton, rendering.text, messages):
                return pieces
        if chat.system is not None and not chat.system.strip():
            raise UserError(
                f"{self._source}: expected a system message with text, or none, as the chat template tells them apart, "
                "found an empty one; CUSTOM in a record's Template means none where no --system_prompt is given"
            )
        raise UserError(
            f"{self._source}: expected a chat template that writes messages as they are, found one that changes what "
            f"stands in this chat, whose last user message begins with {shown(chat.users[-1][:60])}; take out of the "
            "messages what the template looks for in them"
        )

    def _form(self, chat: Chat) -> _Form:
        """The form of all chats with as many turns; made once."""
        key = (chat.system is not None, len(chat.users))
        if key not in self._forms:
            self._forms[key] = self._make_form(*key)
        return self._forms[key]

    def _make_form(self, has_system: bool, turns: int) -> _Form:
        """Renders placeholders, and refuses a template that leaves some out, repeats them or ends no answer."""
        marks = iter(map(placeholder, range(2 * turns + has_system)))
        system = next(marks) if has_system else None
        users, answers = zip(*((next(marks), next(marks)) for _ in range(turns)), strict=True)
        prompt = self._skeleton(Chat(system, users, answers[:-1]), True)
        whole = self._skeleton(Chat(system, users, answers), False)
        end = whole.segments[-1]
        if not _tokens([end]):
            raise UserError(
                f"{self._source}: expected a chat template that ends an answer with a token, as {{{{ eos_token }}}}, "
                f"found {shown(written(end))} behind it: a model would not learn to end; mend the template"
            )
        begin, before = _with_places(prompt), _with_places(Skeleton(whole.segments[:-1], whole.places[:-1]))
        own_front = Skeleton((*prompt.segments, end), (*prompt.places, whole.places[-1]))
        return _Form(
            prompt,
            (whole, own_front),
            before.startswith(begin) and bool(before[len(begin) :].strip()),
            prompt.plain_marks | whole.plain_marks,
        )

    def _skeleton(self, chat: Chat, asked: bool) -> Skeleton:
        """What the template writes around placeholders."""
        count = len(_messages(chat))
        rendering = self._rendered(chat, asked)
        if rendering.error:
            if chat.system is not None and not self._rendered(chat._replace(system=None), asked).error:
                raise self._no_system(rendering.error)
            raise self._refused(rendering)
        found = read_skeleton(rendering.text, self.tokenizer, self._pieces.structure)
        places = list(found.places)
        if chat.system is not None and places and 0 not in places:
            raise self._no_system("it leaves it out")
        first = int(chat.system is not None)  # a template may move the system message to another place
        turns = [place for place in places if place >= first]
        if turns != list(range(first, count)) or len(places) != count or places[-1] != count - 1:
            raise UserError(
                f"{self._source}: expected a chat template that writes every message once, in order, found one that "
                f"leaves out, changes, repeats or reorders some of {count}; mend the template"
            )
        if _begins_twice(found.segments[0], self._bos):
            raise UserError(
                f"{self._source}: expected a chat template that writes the token that begins a text once, found "
                f"{shown(written(found.segments[0])[:60])}: two; take one out of the template"
            )
        return found

    def _refused(self, rendering: Rendering) -> UserError:
        """Of a chat that the template does not take."""
        return UserError(f"{self._source}: expected a chat that the chat template takes, found: {rendering.error}")

    def _no_system(self, why: str) -> UserError:
        """Of a system message that the template does not take."""
        return UserError(
            f"{self._source}: expected no system message, since the chat template has no place for one ({why}); leave "
            "--system_prompt out, and put what it says into the user messages"
        )


@contextlib.contextmanager
def _naming(number: int) -> Iterator[None]:
    """A mistake in the chat of this number."""
    try:
        yield
    except UserError as error:
        raise UnsayableChat(str(error), number) from None


def _messages(chat: Chat) -> Messages:
    """A chat as templates read it."""
    found = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    for turn, user in enumerate(chat.users):
        found.append({"role": "user", "content": user})
        found += [{"role": "assistant", "content": answer} for answer in chat.assistants[turn : turn + 1]]
    return found


def _tokens(segments: Sequence[Sequence[str | Token]]) -> list[Token]:
    """The tokens in segments, in order."""
    return [part for segment in segments for part in segment if isinstance(part, Token)]


def _begins_twice(segment: Sequence[str | Token], bos: int | None) -> bool:
    """Whether the token that begins a text (`bos`, or the first one) stands twice in what a template writes in front of
    all messages, with no text between."""
    runs: list[list[int]] = [[]]
    for part in segment:
        if isinstance(part, Token):
            runs[-1].append(part.id)
        elif part.strip():
            runs.append([])
    first = [number for run in runs for number in run][:1]
    return any(run.count(number) > 1 for run in runs for number in [*first, bos] if number is not None)


def _with_places(skeleton: Skeleton) -> str:
    """A skeleton as text, placeholders in their places."""
    return Pieces(skeleton.segments, tuple(map(placeholder, skeleton.places))).text
