"""Who writes the captions: a vision-language model of transformers on this machine, or a server that speaks OpenAI's protocol.

Both take the frames of a clip as pictures with their times in one message, which every such model understands: a template for videos
would also draw frames of its own choice.
"""

import base64
import contextlib
import hashlib
import io
import os
from unittest import mock

import torch
from PIL import Image

from cogvideox.files import at_home

MOST_NEW_TOKENS = 320  # of the model: 130 words are about 180 of them
MOST_SERVED_TOKENS = 2000  # a server's model may think first
TEMPERATURE = 0.7  # of a second answer, which would otherwise often be the first one again


class NoCaptions(Exception):
    """The model or the server cannot caption at all: a sentence for the user."""


def pictures_of(frames, fps, count, longest_side):
    """[(seconds, picture)] of `count` evenly spaced frames, from the first to the last. frames: uint8 [F, H, W, 3]."""
    last = len(frames) - 1
    chosen = dict.fromkeys(round(i * last / max(count - 1, 1)) for i in range(count)) if count > 1 else [last // 2]
    pictures = [(index / fps, Image.fromarray(frames[index])) for index in chosen]
    for _, picture in pictures:
        picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)  # leaves a smaller one as it is
    return pictures


def message_of(pictures, prompt, show):
    """The content of one message: each picture after its time, then the prompt. show: picture -> its part of the content."""
    parts = []
    for at, picture in pictures:
        parts += [{"type": "text", "text": f"At {at:.1f} seconds:"}] if len(pictures) > 1 else []
        parts.append(show(picture))
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


# -----------------------------------------------------------------------------
# On this machine


class NoVideos(dict):
    """Takes the place of a model's video processor, which needs torchvision: frames go in as pictures, so that nothing else calls it.

    A dict, because transformers copies the parts of a processor and writes them as JSON.
    """

    num_frames = fps = valid_kwargs = None
    model_input_names = ()

    @classmethod
    def from_pretrained(cls, *arguments, **settings):
        return cls()


@contextlib.contextmanager
def without_torchvision():
    """Have transformers load processors with `NoVideos` if torchvision is missing. It loads all parts of a processor or none."""
    from transformers import processing_utils
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        yield
        return
    mixin, of_auto = processing_utils.ProcessorMixin, getattr(processing_utils, "MODALITY_TO_AUTOPROCESSOR_MAPPING", None)
    with contextlib.ExitStack() as patches:
        find = mixin.get_possibly_dynamic_module
        found = staticmethod(lambda name: NoVideos if "VideoProcessor" in name else find(name))
        patches.enter_context(mock.patch.object(mixin, "get_possibly_dynamic_module", found))
        if of_auto is not None:  # transformers 5 asks this mapping, 4 the function above
            look_up = of_auto.__getitem__
            patched = lambda self, key: NoVideos if key == "video_processor" else look_up(key)  # noqa: E731
            patches.enter_context(mock.patch.object(type(of_auto), "__getitem__", patched))
        yield


def local_writer(name, seed):
    """The function (pictures, prompt, try) -> answer of a model of transformers' image-text-to-text classes, a hub id or a folder.

    The first try is greedy. Others draw from a seed, so that a resumed run writes what an uninterrupted one would have written.
    Raises NoCaptions.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    logging.disable_progress_bar()
    try:
        with without_torchvision():
            processor = AutoProcessor.from_pretrained(at_home(name))
        model = AutoModelForImageTextToText.from_pretrained(at_home(name), dtype=dtype).to(device).eval()
    except Exception as error:  # transformers raises many kinds: no such model, no network, a package that this model needs
        raise NoCaptions(f"--model {name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
    if not hasattr(processor, "image_processor") or not getattr(processor, "chat_template", None):
        raise NoCaptions(f"--model {name}: takes no pictures in a chat; give a model such as HuggingFaceTB/SmolVLM2-2.2B-Instruct")
    if hasattr(processor.image_processor, "do_image_splitting"):  # SmolVLM cuts each picture into up to 17, the window into 136
        processor.image_processor.do_image_splitting = False

    @torch.inference_mode()
    def write(pictures, prompt, attempt):
        inputs = processor.apply_chat_template(
            message_of(pictures, prompt, lambda picture: {"type": "image", "image": picture}),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(device, dtype=dtype)
        drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} if attempt == 0 else {}
        drawn = drawn or {"do_sample": True, "temperature": TEMPERATURE}
        content = f"{seed}/{attempt}/{prompt}".encode() + pictures[0][1].tobytes()
        torch.manual_seed(int.from_bytes(hashlib.sha256(content).digest()[:7]))
        tokens = model.generate(**inputs, max_new_tokens=MOST_NEW_TOKENS, **drawn)
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return write


# -----------------------------------------------------------------------------
# On a server


def data_url(picture):
    """A picture as a data URL, a JPEG that no eye tells from it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def served_writer(endpoint, name, seed):
    """(the same function, the model's name) of a server's model; without a name, of the only one that it serves. Raises NoCaptions.

    The key is that of OPENAI_API_KEY. The client tries again after errors of the network and of a server that is busy.
    """
    import openai

    client = openai.OpenAI(base_url=endpoint, api_key=os.environ.get("OPENAI_API_KEY") or "none")

    def ask(call, **arguments):
        try:
            return call(**arguments)
        except openai.APITimeoutError:
            raise NoCaptions(f"--endpoint {endpoint}: did not answer within {client.timeout.read:g} seconds") from None
        except openai.APIConnectionError as error:
            raise NoCaptions(f"--endpoint {endpoint}: no connection ({error.__cause__ or error}); is the server running there?") from None
        except openai.APIStatusError as error:
            raise NoCaptions(f"--endpoint {endpoint}: answered {error.status_code} ({' '.join(error.message.split())[:300]})") from None

    if name is None:
        names = [model.id for model in ask(client.models.list).data]
        if len(names) != 1:
            raise NoCaptions(f"--endpoint {endpoint}: serves {', '.join(names) or 'no models'}; name one with --model")
        (name,) = names

    def write(pictures, prompt, attempt):
        messages = message_of(pictures, prompt, lambda picture: {"type": "image_url", "image_url": {"url": data_url(picture)}})
        temperature = TEMPERATURE if attempt else 0.0
        answer = ask(
            client.chat.completions.create,
            model=name,
            messages=messages,
            max_tokens=MOST_SERVED_TOKENS,
            temperature=temperature,
            seed=seed + attempt,
        )
        return answer.choices[0].message.content or "" if answer.choices else ""

    return write, name
