"""Qwen's tokenizer: training, encoding, chat formats, import and export of every published file form."""

from qwench.tokenizer.tokenizer import StreamDecoder, Tokenizer
from qwench.tokenizer.train import train

__all__ = ["StreamDecoder", "Tokenizer", "train"]
