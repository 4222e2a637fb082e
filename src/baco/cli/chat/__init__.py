"""``baco chat``: talk to a pair, and see which model writes which word."""

import sys
from typing import Any

from baco.cli import options as opt


def chat(
    n: opt.Answers = 1,
    router: opt.RouterSpelling = None,
    diversity: opt.Diversity = None,
    pair: opt.PairName = None,
    base: opt.BaseName = None,
    aligned: opt.AlignedName = None,
    system: opt.System = None,
    seed: opt.Seed = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    max_tokens: opt.MaxTokens = None,
    stop: opt.Stop = None,
    switch: opt.SwitchAt = "word",
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    quantize: opt.Quantize = None,
    draft: opt.Draft = None,
    memory: opt.Memory = None,
    backend: opt.Backend = "local",
    base_url: opt.BaseUrl = None,
    aligned_url: opt.AlignedUrl = None,
    base_model: opt.BaseModel = None,
    aligned_model: opt.AlignedModel = None,
    engine: opt.EngineArguments = None,
    base_template: opt.BaseTemplate = None,
    chat_template: opt.ChatTemplate = None,
    template_arg: opt.TemplateArguments = None,
    date: opt.Date = None,
    trust_remote_code: opt.TrustRemoteCode = None,
) -> None:
    """Talk to a pair; every word is coloured by the model it came from. /help lists commands.

    In a pipe every line is a turn, commands too, and a line that is wrong ends the chat.
    """
    sampling = opt.given(
        {
            "n": n,
            "seed": seed,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "max_tokens": max_tokens,
            "stop": tuple(stop) if stop else None,
        }
    )
    opt.check(sampling, switch, router)
    baco = opt.load(
        pair,
        base,
        aligned,
        dtype=dtype,
        device=device,
        quantize=quantize,
        draft=draft,
        memory=memory,
        backend=backend,
        base_url=base_url,
        aligned_url=aligned_url,
        base_model=base_model,
        aligned_model=aligned_model,
        engine=opt.engine_arguments(engine),
        base_template=base_template,
        chat_template=chat_template,
        template_args=opt.template_arguments(template_arg),
        date=opt.day(date),
        trust_remote_code=trust_remote_code,
    )
    chosen = opt.spelled_router(baco, router, diversity)
    settings: dict[str, Any] = {"system": system, "switch": switch, **sampling}
    settings["seed"] = baco.pair.defaults.updated({"seed": seed}).seeded().seed

    opt.take_today(baco, system=system)

    from baco.cli.chat.conversation import Conversation
    from baco.cli.chat.session import Session

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    Session(Conversation(baco, chosen, settings), interactive=interactive).run()
