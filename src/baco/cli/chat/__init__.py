"""``baco chat``: talk to a pair, and see which model writes which word."""

import sys

from baco.cli import options as opt


@opt.grouped(without=["compile"])
def chat(
    *,
    n: opt.Answers = 1,
    routing: opt.RouterOptions,
    models: opt.PairOptions,
    tokenizers: opt.TokenizerOptions,
    sampling: opt.SamplingOptions,
    weights: opt.WeightOptions,
    backend: opt.Backend = None,
    servers: opt.BackendOptions,
    templates: opt.TemplateOptions,
) -> None:
    """Talk to a pair; every word is coloured by the model it came from. /help lists commands.

    In a pipe every line is a turn, commands too, and a line that is wrong ends the chat.
    """
    settings = sampling.settings(n)
    routing.check()
    baco = opt.load(models, tokenizers, weights, servers, templates, backend=backend)
    router = routing.choose(baco)
    settings["seed"] = baco.pair.defaults.updated({"seed": sampling.seed}).seeded().seed
    opt.take_today(baco, system=sampling.system)

    from baco.cli.chat.conversation import Conversation
    from baco.cli.chat.session import Session

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    Session(Conversation(baco, router, settings), interactive=interactive).run()
