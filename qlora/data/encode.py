"""Tokens with weights from examples, many at a time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qlora.data.answers import draft_conversation
from qlora.data.draft_tokens import DraftTokenizer
from qlora.data.drafts import Answer, Draft
from qlora.data.examples import Completion, Conversation, Example, Labelled, LabelledImage, Preference, Rated, Tokens
from qlora.data.formats import CONVERSATIONS, STORED_COLUMNS
from qlora.data.label_words import with_answers
from qlora.data.labels import BY_TOKENS, LABEL, Labels
from qlora.data.mismatched import BAD, GOOD, RATING
from qlora.data.options import CHOICES
from qlora.data.ratings import MARGIN
from qlora.data.serving import ANSWER, QUESTION, TemplateFacts, tokenizer_notes
from qlora.data.store import Column
from qlora.data.template import adds_bos
from qlora.data.tokens import TokenizedExample, make_example
from qlora.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example in tokens.

    Attributes:
        documents: Its documents: two for a preference, and one per answer for a conversation whose template requires
            it.
        group_size: Number of consecutive documents that belong together: two for a preference, else one.
        per_answer: Whether every answer became a document of its own, because the template renders earlier turns
            differently, a token would join an earlier answer to its prompt, or an earlier answer has no end token.
        eos_added: Whether the tokenizer's EOS was added to an answer, because the template writes no end token.
        switched: Number of answers by the switch of the template that their prompt needs.
        control_tokens: Number of control tokens in its turns and tools, by token.
    """

    documents: list[TokenizedExample]
    group_size: int = 1
    per_answer: bool = False
    eos_added: bool = False
    switched: Counter[str] = field(default_factory=Counter)
    control_tokens: Counter[str] = field(default_factory=Counter)

    @property
    def groups(self) -> list[list[TokenizedExample]]:
        """The documents in groups."""
        size = self.group_size
        return [self.documents[start : start + size] for start in range(0, len(self.documents), size)]


@dataclass(frozen=True, slots=True)
class PendingExamples:
    """Examples that are rendered and being tokenized.

    Attributes:
        examples: The examples.
        drafts: Drafts of each example, or why it has none.
        encodings: Encodings of the drafts' texts, once they are done.
    """

    examples: Sequence[Example]
    drafts: list[list[Draft] | DataError]
    encodings: Future[list[Any]]


class ExampleEncoder:
    """Turns examples into tokens with one tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers, with an EOS token and its chat template set.
        loss_on: Which tokens of a conversation are supervised: `assistant` for the assistant's turns with their end
            tokens, `last` for the last of these turns, `all` for prompts too. In rated conversations, such as those of
            a preference, it is always the last turn.
        labels: Labels of texts, whose words are chosen if they have none; None if there are none to learn.
        template: Description of the chat template, for the report.

    Attributes:
        labels: The labels with their words and tokens.
        template: Description of the chat template.
        batch_rows: Largest number of rows to encode at a time.

    Raises:
        DataError: The tokenizer has no EOS token, so the model would not learn to stop, or is not a fast one.
        ConfigError: The labels' words can't be told apart by one token.
    """

    batch_rows = 512

    def __init__(
        self, tokenizer: Any, loss_on: str = "assistant", labels: Labels | None = None, template: str = ""
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no EOS token, so the model would not learn to stop; set its eos_token.")
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} has no character offsets of tokens; use a fast tokenizer.")
        if loss_on not in CHOICES["loss_on"]:
            raise ConfigError(f"loss_on: {loss_on!r} should be one of {', '.join(CHOICES['loss_on'])}.")
        self.tokenizer = tokenizer
        self.loss_on, self.template = loss_on, template
        self.facts = TemplateFacts(tokenizer)
        self._bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self._draft_tokenizer = DraftTokenizer(tokenizer, self.facts)
        self._executor = ThreadPoolExecutor(max_workers=1)
        is_by_tokens = labels is not None and labels.by == BY_TOKENS
        self.labels = with_answers(labels, self._answer_ids) if labels is not None and is_by_tokens else labels

    def encode(self, examples: Sequence[Example]) -> list[Encoded | DataError]:
        """Encode examples; an example that can't be encoded gives its error instead."""
        return self.finish(self.begin(examples))

    def begin(self, examples: Sequence[Example]) -> PendingExamples:
        """Render examples and start tokenizing their texts in the background; see :meth:`finish`."""
        drafts: list[list[Draft] | DataError] = []
        for example in examples:
            try:
                drafts.append(self._draft(example))
            except DataError as error:
                drafts.append(error)
        texts = [draft.text for group in drafts if not isinstance(group, DataError) for draft in group]
        return PendingExamples(examples, drafts, self._executor.submit(self._draft_tokenizer.encode, texts))

    def finish(self, pending: PendingExamples) -> list[Encoded | DataError]:
        """Return the results of :meth:`encode` for examples that :meth:`begin` was given."""
        encodings = iter(pending.encodings.result())
        to_documents = self._draft_tokenizer.documents
        results: list[Encoded | DataError] = []
        for example, group in zip(pending.examples, pending.drafts, strict=True):
            if isinstance(group, DataError):
                results.append(group)
            elif isinstance(example, Tokens):
                results.append(_encode_ids(example))
            else:
                finished = [document for draft in group for document in to_documents(draft, next(encodings))]
                if isinstance(example, Labelled) and self.labels is not None:
                    try:
                        results.append(self._label(example, finished, self.labels))
                    except DataError as error:
                        results.append(error)
                    continue
                documents = [replace(document, values=_values_of(example)) for document, _ in finished]
                group_size = 2 if isinstance(example, Preference) else 1
                per_answer = len(documents) > group_size
                switched = sum((draft.switched for draft in group), Counter[str]())
                control_tokens = self._count_control_tokens(example)
                eos_added = any(added for _, added in finished)
                results.append(
                    Encoded(
                        documents, group_size, per_answer, eos_added, switched=switched, control_tokens=control_tokens
                    )
                )
        return results

    def _draft(self, example: Example) -> list[Draft]:
        if isinstance(example, Completion):
            begin, text = len(example.prompt), example.prompt + example.completion
            weight = float(self.loss_on == "all")
            answer = Answer(begin, None, len(text), 1.0)
            return [Draft(text, [answer], weight, is_chat=False, needs_end=True, starts=self._bos)]
        if isinstance(example, Labelled) and self.labels is not None and self.labels.words:
            word = self.labels.words[self.labels.value(example.labels)]
            return draft_conversation(self.tokenizer, self.facts, _question(example.text, word), "last")
        if isinstance(example, Labelled):
            return [Draft(example.text, [], 0.0, is_chat=False, starts=self._bos)]
        if isinstance(example, Preference):
            return [*self._draft_rated(example.chosen), *self._draft_rated(example.rejected)]
        if isinstance(example, Rated):
            return self._draft_rated(example.conversation)
        if isinstance(example, Tokens):
            return []
        if isinstance(example, LabelledImage):
            raise DataError("it is an image; set data.format: images, and model.base to one that classifies images.")
        return draft_conversation(self.tokenizer, self.facts, example, self.loss_on)

    def _draft_rated(self, conversation: Conversation) -> list[Draft]:
        """Draft a rated conversation: only its last turn is supervised, for every `loss_on`."""
        messages = conversation.messages
        if messages[-1]["role"] != "assistant":
            raise DataError(f"it should end with the answer that was rated, not with a {messages[-1]['role']} turn.")
        own = conversation.weights[-1] if conversation.weights else 1.0
        if own == 0:
            raise DataError("the answer that was rated has weight 0, so nothing would be supervised; remove the mask.")
        weights = [*[0.0] * (len(messages) - 1), own]
        return draft_conversation(self.tokenizer, self.facts, Conversation(messages, conversation.tools, weights))

    def shorten(self, example: Labelled, limit: int) -> Encoded | DataError:
        """Encode a labelled text that has too many tokens, without the end of the text.

        Args:
            example: The text.
            limit: Largest number of tokens of the document.
        """
        (offsets,) = (encoding.offsets for encoding in self._draft_tokenizer.encode([example.text]))
        kept = len(offsets)
        (result,) = self.encode([example])
        while not isinstance(result, DataError) and (excess := len(result.documents[0]) - limit) > 0:
            kept -= excess
            if kept < 1:
                return DataError(
                    f"a prompt and an answer take {len(result.documents[0])} tokens, so nothing is left of the text "
                    f"with data.max_seq_len {limit}; raise it."
                )
            (result,) = self.encode([replace(example, text=example.text[: offsets[kept - 1][1]])])
        return result

    def _label(self, example: Labelled, finished: Sequence[tuple[TokenizedExample, bool]], labels: Labels) -> Encoded:
        """Return a labelled text's document with its label; by tokens, check that it ends with the label's answer."""
        ((document, eos_added),) = finished
        value = labels.value(example.labels)
        if labels.answers and tuple(document.input_ids[document.loss_mask].tolist()) != labels.answers[value]:
            raise DataError(
                "its label has other tokens after this text than after others; set data.chat_template to one that "
                "ends prompts with a special token or a line break (the built-in chatml does)."
            )
        return Encoded([replace(document, values={LABEL: value})], eos_added=eos_added)

    def columns(self, format: str) -> Sequence[Column]:
        """Return the columns of a format's stores, in addition to those of every store."""
        if format == "classification" and self.labels is not None:
            return (self.labels.column(),)
        return STORED_COLUMNS.get(format, ())

    def identity(self) -> list[Any]:
        """Return what the documents depend on besides rows and options, as JSON values."""
        return [
            self.tokenizer.backend_tokenizer.to_str(),
            self.tokenizer.special_tokens_map,
            self.tokenizer.chat_template,
        ]

    def notes(self, format: str) -> list[str]:
        """Return lines on the tokenizer, and on the chat template if a format uses it."""
        return [*tokenizer_notes(self.tokenizer), *(self.facts.notes() if format in CONVERSATIONS else ())]

    def _answer_ids(self, word: str) -> tuple[int, ...]:
        """Return the supervised tokens of an answer."""
        (encoded,) = self.encode([_question(QUESTION["content"], word)])
        if isinstance(encoded, DataError):
            raise ConfigError(f"data.labels: {word!r} can't be answered: {encoded}")
        (document,) = encoded.documents
        return tuple(document.input_ids[document.loss_mask].tolist())

    def _count_control_tokens(self, example: Example) -> Counter[str]:
        """Count the control tokens in the turns and tools of an example."""
        conversations: list[Conversation] = []
        if isinstance(example, Conversation):
            conversations = [example]
        elif isinstance(example, Preference):
            conversations = [example.chosen, example.rejected]
        elif isinstance(example, Rated):
            conversations = [example.conversation]
        return Counter(
            token for each in conversations for token in self.facts.control_tokens([each.messages, each.tools])
        )


def _values_of(example: Example) -> Mapping[str, Any]:
    """Return what is stored of an example's documents besides their tokens, by column."""
    if isinstance(example, Rated):
        return {RATING: np.int8(GOOD if example.is_good else BAD)}
    if isinstance(example, Preference):
        return {MARGIN: np.float32(example.margin)}
    return {}


def _question(text: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": answer}])


def answer_end_id(tokenizer: Any) -> int:
    """Return the id that ends an answer in the tokenizer's chat template, which training teaches the model to emit."""
    conversation = Conversation([QUESTION, ANSWER])
    (encoded,) = ExampleEncoder(tokenizer).encode([conversation])
    if isinstance(encoded, DataError):
        return int(tokenizer.eos_token_id)
    (example,) = encoded.documents
    return int(example.input_ids[example.loss_mask][-1])


def _encode_ids(example: Tokens) -> Encoded | DataError:
    wrong = [token for token in example.input_ids if not isinstance(token, int) or not 0 <= token < 2**31]
    if wrong:
        return DataError(f"input_ids should be token ids, integers from 0, not {wrong[0]!r}.")
    return Encoded([make_example(example.input_ids, example.weights)])
