"""What a caption must be for CogVideoX, and how an answer of a vision-language model becomes one.

The model was trained on captions of 90 to 100 words in one paragraph (the authors' own examples have 91 to 96), and its T5 reads 226
tokens, which are about 140 words.
"""

import re

from cogvideox.folder import token_ids, unknown_shares

FEWEST_WORDS, MOST_WORDS = 60, 130  # accepted; WANTED is asked for
WANTED = "90 to 100 words"

PROMPT = f"""Describe what happens in this video as one paragraph of {WANTED}, in plain English and in the present tense.
Name the subject first, with its clothes and its look. Then tell the action in the order of time, with words such as "Moments later" and
"Finally". Then the place, the light and the mood. Tell only what is seen. Never mention a video, a clip, frames, images or cuts. Write
no list, no title and nothing before or after the paragraph."""

# How an answer about a video begins, rather than a description of what is in it.
OPENINGS = (
    r"(in |throughout |over )?(the|this|these) (\w+ )?(videos?|clips?|footage|frames?|images?|pictures?|photos?|scene|sequence|series)\b",
    r"(a|an) (short |brief )?(video|clip|series|sequence|montage)\b",
    r"(video|footage|scene|title|caption|description|frame \d+)\b",
    r"(here is|here's|here are|sure|certainly|of course|okay|i |i'm|as an ai|we see|we can see|based on)\b",
)
# What tells about the video anywhere. A picture frame, a hair clip and a film camera are things that a video may show.
ABOUT_THE_VIDEO = (
    r"\b(the|this) (video|clip|footage)\b",
    r"\b(first|second|third|fourth|fifth|last|final|next|each|every|following|subsequent) (frame|image|clip|shot)s?\b",
    r"\bframes? (at )?\d",
    r"\b(camera|scene|shot|view|video|film) (then |now |suddenly )?(cuts|switches|changes to|transitions)\b",
    r"\bcuts? to (a|an|the|another)\b",
)
LIST = r"(?m)^\s*([-*•#]|\d+[.)])\s"


def tidy(answer):
    """The answer without what models put around a caption: thoughts, a label, quotes, Markdown's stars, line breaks in a paragraph."""
    text = re.sub(r"(?s)^.*</think>", "", answer).replace("\r", "").strip()
    text = re.sub(r"(?i)^\W{0,3}(caption|description|paragraph|answer)\W{0,2}:\W{0,3}\s*", "", text)
    text = re.sub(r"\*\*|__|`", "", text).strip()
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”", "''"):
        text = text[1:-1].strip()
    if re.search(LIST, text):
        return text
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def sentences_of(text):
    """The sentences of a text, the last one also if it has no end."""
    return [part for part in re.split(r"(?<=[.!?])[\"”’']?\s+(?=\S)", text.strip()) if part]


def ends_well(text):
    """Whether a text ends with the end of a sentence."""
    return bool(re.search(r"[.!?][\"”’')]?$", text))


def key_of_sentence(sentence):
    """What two sentences have in common that are the same to a reader."""
    return " ".join(re.findall(r"\w+", sentence.lower()))


def faults_of(caption, tokenizer, id_token, limit):
    """The rules that a caption breaks, as what is told to the model: [] if it can be trained on.

    limit: T5's tokens, of which the trigger word before the caption takes some.
    """
    if not caption.strip():
        return ["it was empty"]
    faults, words = [], len(caption.split())
    sentences = [key_of_sentence(sentence) for sentence in sentences_of(caption)]
    tokens = count_tokens(caption, tokenizer, id_token)
    if words < FEWEST_WORDS:
        faults.append(f"it had {words} words, and {WANTED} are needed")
    if words > MOST_WORDS or tokens > limit:
        faults.append(f"it was too long: it had {words} words, and {WANTED} are needed")
    if re.search(LIST, caption):
        faults.append("it was a list or had a heading, and one paragraph is needed")
    elif "\n\n" in caption:
        faults.append("it had several paragraphs, and one is needed")
    if found := next((match for rule in OPENINGS if (match := re.match(rule, caption, re.I))), None):
        faults.append(f'it began with "{found[0].strip()}"; begin with the subject itself')
    elif found := next((match for rule in ABOUT_THE_VIDEO if (match := re.search(rule, caption, re.I))), None):
        faults.append(f'it said "{found[0]}"; tell what is seen, not how it is shown')
    if len(set(sentences)) < len(sentences):
        faults.append("it said a sentence twice")
    if not ends_well(caption):
        faults.append("its last sentence had no end")
    if unknown_shares(tokenizer, [caption])[0]:
        odd = dict.fromkeys(c for c in caption if not c.isspace() and unknown_shares(tokenizer, [c])[0])
        faults.append(f"it had characters that cannot be read ({' '.join(odd) or 'such as emoji'}); use English letters only")
    return faults


def count_tokens(caption, tokenizer, id_token):
    """The tokens that T5 makes of a caption with the trigger word before it, the end token among them."""
    return len(token_ids(tokenizer, [f"{id_token} {caption}" if id_token else caption])[0])


def shortened(caption, tokenizer, id_token, limit):
    """The caption up to the end of the last sentence with which it keeps all rules; None if no such part keeps them.

    A sentence that was there before is left out: models that repeat themselves rarely stop.
    """
    kept, seen, best = [], set(), None
    for sentence in sentences_of(caption.split("\n\n")[0]):
        if key_of_sentence(sentence) in seen:
            continue
        seen.add(key_of_sentence(sentence))
        kept.append(sentence)
        text = " ".join(kept)
        best = best if faults_of(text, tokenizer, id_token, limit) else text
    return best


def best_of(attempts, tokenizer, id_token, limit):
    """(caption, whether it was shortened) of the attempt that keeps the rules, or that does so when shortened: the longest of those.

    (None, False) if there is none.
    """
    for caption in attempts:
        if not faults_of(caption, tokenizer, id_token, limit):
            return caption, False
    parts = [part for caption in attempts if (part := shortened(caption, tokenizer, id_token, limit))]
    return (max(parts, key=lambda part: len(part.split())), True) if parts else (None, False)
