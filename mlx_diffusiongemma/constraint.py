"""A grammar over the tokens of a canvas: which of a step's proposals can stay, and what takes the place of the others.

A canvas is proposed as a whole, so the automaton walks over it from the left, from the state that the canvases before
left behind, and starts anew in every step:

    proposal   {" name " :  42 [ }  ...        kept while the automaton takes it
    path       {" name " :  42 , "age  ...     at a violation: what the grammar forces there, else the best allowed
                             ^ repaired        token, and what it forces behind that; then on over the proposal

The walk ends at an end token, which only stands where the grammar accepts, behind the last repair that it has, or with
the canvas. Where the proposal wants to end and may not yet, a short way to an end is gone at once. Where the room left
for the answer becomes short, the path is cut back to where a short ending still fits.

A thought in front of the answer is free. What a grammar is made from is in `grammar.py`, the search for endings in
`endings.py`. No network and no MLX here: logits come in as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from .automaton import Automaton, Mask, Vocabulary, vocabulary
from .endings import explored_ending, quick_ending, short_ending
from .grammar import Grammar
from .output import THOUGHT
from .tokenizer import Tokenizer

Best = Callable[[int, Mask], int]  # position in the canvas, allowed ids [V] -> the allowed id that is most likely there

MAX_CUTS = 40  # places where an ending is looked for, after every four with double the distance
NEAR_CANVASES = 16  # of room and more: no ending is looked for yet


class Walk(NamedTuple):
    """What a walk over a proposal found. Positions count within the canvas."""

    token_ids: tuple[int, ...]  # valid from the left; shorter than the canvas at an end or when repairs are spent
    end_id: int | None  # the end token behind them, if it has a place in the canvas
    ended: bool  # the answer is complete: an end token follows, or the room is full where the grammar accepts
    repairs: int  # violations that were repaired; a short way to an end is none
    pins: dict[int, int]  # position -> token where path and end differ from the proposal


class Constraint:
    """The grammar of one request on its way through the canvases."""

    def __init__(
        self,
        grammar: Grammar,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        *,
        thinking: bool,
        thinking_open: bool = False,
    ) -> None:
        """Begin in front of the answer.

        Args:
            grammar: of the answer.
            tokenizer: of the checkpoint.
            end_ids: tokens that end the answer, at least one.
            thinking: whether the answer may begin with a thought; if not, only with an empty one, which the
                released checkpoint likes to write.
            thinking_open: whether the prompt has opened a thought.

        Raises:
            ValueError: no end token, or the grammar does not fit this tokenizer, is too complex, or allows nothing.
        """
        if not end_ids:
            raise ValueError("a constraint needs at least one end token, got none")
        words = vocabulary(tokenizer)
        start = words.compile(grammar)
        self._rules = _rules(words, tokenizer, frozenset(end_ids), thinking)
        self._state = _State(self._rules, start.copy(), "thought" if thinking_open else "start")
        self._start = self._state.copy()
        self._hopeless_room = -1  # for which no ending was found behind what is committed
        self._planned: list[int] = []  # path and ending of the last walk that had to look for one
        self._fallback: list[int] = []  # what is left of such a plan behind what is committed

    @property
    def can_end(self) -> bool:
        """Whether what was committed is a complete answer."""
        return self._state.accepts

    @property
    def is_complete(self) -> bool:
        """Whether what was committed is a complete answer that nothing can follow."""
        return self._state.accepts and self._state.is_stopped

    @cached_property
    def shortest(self) -> int | None:
        """Tokens of a short answer, found by search and not proven to be the shortest; None if none was found."""
        ending = short_ending(self._rules.words, self._start)
        return None if ending is None else len(ending)

    def forced(self) -> tuple[int, ...]:
        """Return the tokens that the grammar forces at the start of the next canvas."""
        return tuple(self._state.forced())

    def commit(self, token_ids: Sequence[int]) -> None:
        """Take over the tokens that a canvas adds to the answer, its end token not among them.

        Raises:
            ValueError: the grammar does not allow them.
        """
        committed = list(token_ids)
        self._fallback = self._planned[len(committed) :] if self._planned[: len(committed)] == committed else []
        self._planned, self._hopeless_room = [], -1
        taken = self._state.take(token_ids)
        if taken < len(token_ids):
            raise ValueError(f"the grammar does not allow token {token_ids[taken]} at position {taken} of the canvas")

    def walk(self, proposal: Sequence[int], best: Best, *, repairs: int, room: int) -> Walk:
        """Find the valid path that keeps as much of a proposal as possible, from the left.

        Args:
            proposal: [C], the most likely token of every position.
            best: asked for a token where the grammar leaves a choice.
            repairs: violations that may be repaired; behind the last one the rest is left to the next step.
            room: tokens that the answer may still get; an end token needs none.

        Raises:
            ValueError: the automaton grew over its limits.
        """
        walker = _Walker(self._state.copy(), tuple(proposal), best, repairs, room)
        walker.run()
        C = len(proposal)
        self._planned = []
        short = room < NEAR_CANVASES * C and room < 2 * C + 2 * (self.shortest or 0)
        if not walker.ended and (short or walker.is_stuck):
            self._end_in_room(walker)
        return walker.result()

    def _end_in_room(self, walker: _Walker) -> None:
        """Cut the path back to where a valid ending fits, and end it so; without such a place leave it as it is.

        Inside of a text or a thought the end is equally far everywhere, so the next place to look at is as far in
        front as the ending is too long. Where it turns out to be shorter there, the way back is tried.
        """
        room, length = walker.room, len(walker.path)
        kept, too_far = length, length + 1
        found: tuple[_State, int, list[int]] | None = None
        for cut in range(1 if room <= self._hopeless_room else MAX_CUTS):
            state = self._state.copy()
            state.take(walker.path[:kept])
            ending = self._ending(state, kept, length, room)
            if ending is not None and kept + len(ending) <= room:
                found = state, kept, ending
                kept += min(room - kept - len(ending), too_far - kept - 1)
                if kept == found[1]:
                    break
            elif kept == 0:
                break
            else:
                too_far = kept
                back = (kept + 1) // 2 if ending is None else (kept + len(ending) - room) << cut // 4
                kept = max(0, kept - back) if found is None else (found[1] + kept) // 2
                if found is not None and kept == found[1]:
                    break
        if found is None:
            self._hopeless_room = max(room, self._hopeless_room)
            return
        state, kept, ending = found
        self._planned = [*walker.path[:kept], *ending]
        if kept < length or walker.is_stuck or kept == room:
            walker.end_with(state, kept, ending)

    def _ending(self, state: _State, kept: int, whole: int, room: int) -> list[int] | None:
        """Return an ending behind `kept` of `whole` tokens of the path, one that fits if the search finds any."""
        words = self._rules.words
        ending = short_ending(words, state)
        if ending is None and kept in (0, whole) and room > self._hopeless_room:
            ending = explored_ending(words, state)
        if kept == 0 and (ending is None or len(ending) > room):
            if self._fallback and len(self._fallback) <= room:
                return self._fallback
            ending = None if room <= self._hopeless_room else short_ending(words, state, room)
        return ending


@dataclass(frozen=True)
class _Rules:
    """What holds for a whole request."""

    words: Vocabulary
    end_ids: frozenset[int]
    thinking: bool
    empty_thought: tuple[int, ...]  # nothing where the tokenizer has no channels
    in_thought: Mask  # tokens that a thought may hold, its end among them

    @property
    def opened(self) -> int | None:
        return self.empty_thought[0] if self.empty_thought else None

    @property
    def closed(self) -> int | None:
        return self.empty_thought[-1] if self.empty_thought else None

    def only(self, token_ids: Collection[int]) -> Mask:
        """Return the mask that allows exactly these tokens."""
        mask = np.zeros(self.words.size, dtype=np.bool_)
        mask[[token_id for token_id in token_ids if token_id < self.words.size]] = True
        return mask


def _rules(words: Vocabulary, tokenizer: Tokenizer, end_ids: frozenset[int], thinking: bool) -> _Rules:
    opened, closed = tokenizer.special.channel_open, tokenizer.special.channel_close
    in_thought = np.ones(words.size, dtype=np.bool_)
    # No control token but its end: a tool call that opens in a thought would swallow the answer behind it.
    in_thought[[token_id for token_id in tokenizer.all_special_ids | end_ids if token_id < words.size]] = False
    if opened is None or closed is None:
        return _Rules(words, end_ids, False, (), in_thought)
    in_thought[closed] = True
    return _Rules(words, end_ids, thinking, (opened, *tokenizer.encode(THOUGHT), closed), in_thought)


class _State:
    """Where the answer is: at its start, in an empty thought, in a free one, or in what the grammar describes."""

    def __init__(
        self, rules: _Rules, automaton: Automaton, mode: Literal["start", "empty", "thought", "answer"], seen: int = 0
    ) -> None:
        self.rules = rules
        self.mode = mode
        self._automaton = automaton
        self._seen = seen  # tokens of the empty thought

    def copy(self) -> _State:
        """Return a second state, to be changed on its own."""
        return _State(self.rules, self._automaton.copy(), self.mode, self._seen)

    def take(self, token_ids: Sequence[int]) -> int:
        """Go on over the tokens while they are allowed; return how many were. An end token never is."""
        for index, token_id in enumerate(token_ids):
            if self.mode == "answer":
                return index + self._automaton.take(token_ids[index:])
            if not self._take_before_answer(token_id):
                return index
        return len(token_ids)

    def _take_before_answer(self, token_id: int) -> bool:
        rules = self.rules
        if self.mode == "start" and token_id == rules.opened:
            self.mode = "thought" if rules.thinking else "empty"
            self._seen = 1
        elif self.mode == "start":
            if not self._automaton.take([token_id]):
                return False
            self.mode = "answer"
        elif not 0 <= token_id < rules.words.size or not self.allowed()[token_id]:
            return False
        else:
            self._seen += 1
            if token_id == rules.closed:
                self.mode = "answer"
        return True

    @property
    def accepts(self) -> bool:
        """Whether the answer so far is complete."""
        return self.mode in ("start", "answer") and self._automaton.accepts

    @property
    def is_stopped(self) -> bool:
        """Whether nothing can follow."""
        return self.mode in ("start", "answer") and self._automaton.is_stopped

    def forced(self) -> list[int]:
        """Return the tokens that must come next; none where there is a choice."""
        if self.mode == "empty":
            return list(self.rules.empty_thought[self._seen :])
        if self.mode == "thought" or (self.mode == "start" and self.rules.thinking):
            return []
        return self._automaton.forced()

    def allowed(self) -> Mask:
        """Return which tokens may come next [V], end tokens among them where the answer is complete."""
        if self.mode == "thought":
            return self.rules.in_thought
        if self.mode == "empty":
            return self.rules.only([self.rules.empty_thought[self._seen]])
        mask = self._automaton.allowed()
        if self.mode == "start" and self.rules.opened is not None:
            mask[self.rules.opened] = True
        if self._automaton.accepts:
            mask |= self.rules.only(self.rules.end_ids)
        return mask


class _Walker:
    """One walk: a state, the path that led to it, and what is left of repairs and room."""

    def __init__(self, state: _State, proposal: tuple[int, ...], best: Best, repairs: int, room: int) -> None:
        self.state = state
        self.path: list[int] = []
        self.ended = False
        self.is_stuck = False  # in a place that the grammar has no way out of
        self.may_close = True  # until a search for a short way to an end has failed
        self.room = room
        self._proposal = proposal
        self._best = best
        self._repairs_left = self._repairs = repairs
        self._end_id: int | None = None

    @property
    def _limit(self) -> int:
        return min(len(self._proposal), self.room)

    def run(self) -> None:
        """Walk to an end, over the whole proposal, or to just behind the last repair there is."""
        while len(self.path) < self._limit and not self.ended and not self.is_stuck:
            at = len(self.path)
            kept = self.state.take(self._proposal[at : self._limit])
            self.path += self._proposal[at : at + kept]
            if len(self.path) == self._limit:
                break
            repairs_left = self._repairs_left
            if not self._step() or self._repairs_left < repairs_left == 1:
                break
        if len(self.path) < self._limit and not self.ended and self.state.accepts and self.state.is_stopped:
            self._end()
        if len(self.path) == self.room and self.state.accepts:
            self.ended = True

    def _step(self) -> bool:
        """Put something in the place of a proposal that is no part of the text; return whether that was possible."""
        at = len(self.path)
        if self.state.accepts and (self._proposal[at] in self.state.rules.end_ids or self.state.is_stopped):
            self._end()
            return True
        if self._proposal[at] in self.state.rules.end_ids and self._close():
            return True
        if not self._repairs_left:
            return False
        if self._take_forced():
            self._repairs_left -= 1
            return True
        allowed = self.state.allowed()
        if not allowed.any():
            self.is_stuck = True
            return False
        self._repairs_left -= 1
        token_id = self._best(at, allowed)
        if token_id in self.state.rules.end_ids:
            self.ended, self._end_id = True, token_id
            return True
        if not self.state.take([token_id]):
            raise ValueError(f"position {at} was given token {token_id}, which the grammar does not allow there")
        self.path.append(token_id)
        self._take_forced()
        return True

    def _close(self) -> bool:
        """Go the short way to an end, where the model wants to end and may not yet; return whether there is one.

        What is likelier takes the place of a token on that way where the way does not become longer by it.
        """
        if not self.may_close:
            return False
        ending = quick_ending(self.state.rules.words, self.state)
        if not ending:
            self.may_close = False
            return False
        while ending and len(self.path) < self._limit:
            following, *ending = ending
            likely = self._best(len(self.path), self.state.allowed())
            if likely != following:
                trial = self.state.copy()
                rest = quick_ending(self.state.rules.words, trial) if trial.take([likely]) else None
                if rest is not None and len(rest) <= len(ending):
                    following, ending = likely, rest
            self.state.take([following])
            self.path.append(following)
        return True

    def _take_forced(self) -> bool:
        forced = self.state.forced()[: self._limit - len(self.path)]
        taken = self.state.take(forced)
        self.path += forced[:taken]
        return taken > 0

    def _end(self) -> None:
        """Put an end token behind the path: the proposed one, the only one, or the best."""
        at, end_ids = len(self.path), self.state.rules.end_ids
        if self._proposal[at] in end_ids:
            self._end_id = self._proposal[at]
        elif len(end_ids) == 1:
            self._end_id = next(iter(end_ids))
        else:
            self._end_id = self._best(at, self.state.rules.only(end_ids))
        self.ended = True

    def end_with(self, state: _State, kept: int, ending: list[int]) -> None:
        """Replace what is behind `kept` tokens by an ending; `state` is the one there."""
        self.path = (self.path[:kept] + ending)[: self._limit]
        state.take(self.path[kept:])
        self.state = state
        if len(self.path) < self._limit:
            self._end()
        self.ended = self.ended or (len(self.path) == self.room and state.accepts)

    def result(self) -> Walk:
        """Return what was found."""
        final = [*self.path] if self._end_id is None else [*self.path, self._end_id]
        pins = {at: token_id for at, token_id in enumerate(final) if token_id != self._proposal[at]}
        used = self._repairs - self._repairs_left
        return Walk(tuple(self.path), self._end_id, self.ended, used, pins)
