"""All cases of the zoo, by name: importing this registers them."""

import importlib

from tests.zoo.case import cases as cases

FILES = (
    *("encoders", "decoders", "encoder_decoders", "vision", "audio", "experts", "state_space"),
    *("plain_images", "plain_sequences", "plain_others"),
)
for _file in FILES:
    importlib.import_module(f"tests.zoo.{_file}")
