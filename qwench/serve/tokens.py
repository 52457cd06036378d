"""POST /tokenize and /detokenize: what a text or a conversation is to the model."""

from __future__ import annotations

from fastapi import Response
from fastapi.responses import JSONResponse

from qwench.serve.errors import value_error
from qwench.serve.params import known_model, off_loop, render
from qwench.serve.protocol import DetokenizeRequest, TokenizeRequest
from qwench.serve.service import Service


async def tokenize(service: Service, request: TokenizeRequest) -> Response:
    """Ids of a text or of a rendered conversation. Raises ApiError."""
    engine = service.engine
    known_model(request.model, service.config.model_names)
    if request.messages is not None:
        wanted = request.add_generation_prompt is not False
        ids = await render(engine, request.messages, request.tools, add_generation_prompt=wanted)
    else:
        text, parse = request.prompt or "", bool(request.parse_special)
        ids = await off_loop(len(text), lambda: engine.tokenizer.encode(text, parse_special=parse))
    body = {"tokens": ids, "count": len(ids), "max_model_len": engine.max_len}
    if request.return_token_strs:
        decode = engine.tokenizer.decode
        body["token_strs"] = await off_loop(len(ids), lambda: [decode([token_id]) for token_id in ids])
    return JSONResponse(body)


async def detokenize(service: Service, request: DetokenizeRequest) -> Response:
    """The text of ids. Raises ApiError for an id that the tokenizer does not have."""
    tokenizer = service.engine.tokenizer
    known_model(request.model, service.config.model_names)
    if wrong := [token for token in request.tokens if token >= tokenizer.vocab_size]:
        raise value_error(f"tokens has id {wrong[0]}, but this model's ids end at {tokenizer.vocab_size - 1}", "tokens")
    text = await off_loop(len(request.tokens), lambda: tokenizer.decode(request.tokens))
    return JSONResponse({"prompt": text})
