"""Words for a motion: short English, varied, and true. Left, right, up and down of a pan are the camera's."""

from .motion import ClipError, Draws, Motion, Move, Sprite, make_move

# The six basic moves by which prompt following is measured; each is also one of the trained phrasings.
CANONICAL = {
    "camera pans left": "pan left",
    "camera pans right": "pan right",
    "camera pans up": "pan up",
    "camera pans down": "pan down",
    "zoom in": "zoom in",
    "zoom out": "zoom out",
}
STILL = ("the camera stays still", "still camera", "static shot", "fixed camera")
ADVERBS = {"slow": "slowly", "steady": "steadily", "fast": "fast"}
# {v} adverb with a leading space or nothing, {a} adjective with a trailing space or nothing, {d} direction.
PHRASES = {
    "pan": ("camera pans {d}{v}", "the camera pans {d}{v}", "{a}pan {d}", "the view moves {d}{v}"),
    "zoom": ("{a}zoom {d}", "camera zooms {d}{v}", "the camera zooms {d}{v}"),
    "roll": ("camera rolls {d}{v}", "the camera rolls {d}{v}", "{a}roll {d}"),
    "tilt": ("{a}perspective tilt {d}", "perspective tilts {d}{v}"),
}
LIGHT_PHRASES = {
    "warmer": ("light gets warmer", "the light turns warm"),
    "cooler": ("light gets cooler", "the light turns cold"),
    "brighter": ("it gets brighter", "light gets brighter"),
    "dimmer": ("it gets darker", "light gets dimmer"),
    "passes left": ("a light passes left", "a light moves to the left"),
    "passes right": ("a light passes right", "a light moves to the right"),
}


def canonical_motion(prompt: str) -> Motion:
    """The basic move of a canonical prompt, at a steady constant speed. Raises ClipError for any other prompt."""
    if prompt not in CANONICAL:
        raise ClipError(f"canonical prompt: got {prompt!r}, want one of {', '.join(CANONICAL)}; pick one")
    return Motion((make_move(CANONICAL[prompt]),))


def describe(motion: Motion, draws: Draws) -> str:
    """A prompt that says what moves, in words drawn at random: "slow zoom in, a ball crosses right"."""
    parts = [_move_words(move, draws) for move in motion.moves] or [STILL[draws.below(len(STILL))]]
    if motion.shake:
        parts.append(("handheld camera", "slight camera shake")[draws.below(2)])
    if motion.sprite:
        parts.append(_sprite_words(motion.sprite, draws))
    if motion.light:
        phrases = LIGHT_PHRASES[motion.light.kind]
        parts.append(phrases[draws.below(len(phrases))])
    return ", ".join(parts)


def _move_words(move: Move, draws: Draws) -> str:
    kind, direction = move.kind.split(maxsplit=1)
    phrases = PHRASES[kind]
    phrase = phrases[draws.below(len(phrases))]
    # Without a word the speed is a steady one; slow and fast are always said.
    said = move.speed != "steady" or draws.chance(0.4)
    adverb = f" {ADVERBS[move.speed]}" if said else ""
    adjective = f"{move.speed} " if said else ""
    return phrase.format(d=direction, v=adverb, a=adjective)


def _sprite_words(sprite: Sprite, draws: Draws) -> str:
    name = f"a {sprite.shape}"
    across, down = sprite.travel[0], sprite.travel[1] + sprite.gravity
    if across:
        side = "right" if across > 0 else "left"
        verbs = ("is thrown {}", "flies {} and falls") if sprite.gravity else ("crosses {}", "moves {}", "slides {}")
        return f"{name} {verbs[draws.below(len(verbs))].format(side)}"
    if down < 0:
        return f"{name} {('rises', 'moves up')[draws.below(2)]}"
    verbs = ("falls", "drops down") if sprite.gravity else ("sinks", "moves down")
    return f"{name} {verbs[draws.below(2)]}"
