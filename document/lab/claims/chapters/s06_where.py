"""6. Where is LoRA Applied?"""

from lab.claims import (
    Chapter,
    Result,
    at_least,
    at_most,
    between,
    less_than,
    more_than,
    probability,
)
from lab.claims.sources import KB, Record, Sources, calc, find, n, percent
from lab.tables import Spread

chapter = Chapter()


with chapter.section("6") as claim:

    @claim("Figure 5: the LayerNorm and Feed-Forward layers typically remain unchanged", 0)
    def placement(m: Sources) -> Result:
        fc1, fc2 = m.rows("figures/placement", module=("fc1", "fc2"))
        norms = m.column("figures/placement", "trained", kind="LayerNorm")
        why = (
            "parameters that the adapter trains there, in a block of the model as it is loaded "
            "with it"
        )
        return {"LayerNorm": max(norms), "Feed-Forward": fc1.trained + fc2.trained}, why

    def loss_of(m: Sources, targets: str) -> Spread:
        """The loss on the corrections with LoRA on these projections."""
        return m.over_seeds("fact_correction/projections", "new_loss", targets=targets)

    @claim("W_Q and W_V are the most important (largest effect)", True)
    def q_and_v_matter_most(m: Sources) -> Result:
        table, modules = "fact_correction/projections", ("q_proj", "k_proj", "v_proj", "o_proj")
        q, k, v, o = (m.over_seeds(table, "probability_target", targets=name) for name in modules)
        return {"W_Q": q > max(k, o), "W_V": v > max(k, o)}, (
            "more than W_K and W_O, each trained alone; the corrected word gets "
            f"{percent(q)} by W_Q, {percent(k)} by W_K, {percent(v)} by W_V, {percent(o)} by W_O"
        )

    @claim("W_K and W_O provide additional gain", True)
    def k_and_o_add(m: Sources) -> Result:
        two, four = loss_of(m, "q_proj+v_proj"), loss_of(m, "attention")
        why = f"loss on the corrections: {n(two)} with W_Q and W_V, {n(four)} with all four"
        return {"in the mean": four < two, "beyond the spread over seeds": four.high < two.low}, why

    @claim("Feed-Forward layers optional, helps with some tasks", True)
    def feed_forward_optional(m: Sources) -> Result:
        attention, alone, both = (
            loss_of(m, targets) for targets in ("attention", "feed_forward", "all")
        )
        return {
            "optional: within 0.05 nats without": attention - both <= 0.05,
            "helps here": both < attention,
        }, (
            f"loss on the corrections: {n(attention)} with attention, {n(alone)} with "
            f"feed-forward, {n(both)} with both"
        )

    @claim("FACT_CORRECTION_DATA with three sentences", 3)
    def fact_data(m: Sources) -> Result:
        measured = len(m.lines("study_fact_correction.data"))
        why = (
            "the table of results has a fourth fact, der mann liest das buch; the data here has "
            f"{measured} sentences"
        )
        return measured, why

    @claim("both tables: the first choice of each model after each prompt, 21 in all", 21)
    def fact_first_choices(m: Sources) -> Result:
        settings = m.column("fact_correction/settings", "first_choices")
        same = m.column("fact_correction/rows", "ours", same_first=True)
        return {"nearest setting": len(same), "the worst of the settings": 7 + min(settings)}, (
            f"cells with the document's word first, with every seed; of the {len(settings)} "
            "settings that the document leaves open the nearest is chosen by them, and the "
            "original model's 7 do not depend on it"
        )

    @claim(
        "both variants successfully learn the corrected facts",
        more_than("50%"),
        words="successfully",
    )
    def fact_every_setting(m: Sources) -> Result:
        v, every = (
            m.column("fact_correction/rows", "least", kind="corrected", model=model)
            for model in ("v_proj", "all")
        )
        why = (
            "the least probable of the four corrected words, over all windows, rates and alphas "
            "tried"
        )
        return {"V-only": min(v), "All": min(every)}, why

    def fact_before(prompt: str, noun: str, word: str, share: str) -> None:
        @claim(
            f"{prompt} → Original: {word} ({share})", probability(share), id=f"fact-{noun}-original"
        )
        def measure(m: Sources) -> Result:
            row = m.row("fact_correction/rows", prompt=prompt, model="original")
            return row.measured, "the pretrained model before any correction"

    def fact_after(prompt: str, noun: str, model: str, word: str, share: str) -> None:
        name, end = {"v_proj": ("LoRA V-only", "v"), "all": ("LoRA All", "all")}[model]

        @claim(f"{prompt} → {name}: {word} ({share})", probability(share), id=f"fact-{noun}-{end}")
        def measure(m: Sources) -> Result:
            row = m.row("fact_correction/rows", prompt=prompt, model=model)
            parts = m.rows(
                "fact_correction/parts", model=model, trained=("embeddings and head", "A and B")
            )
            ends, matrices = (percent(getattr(part, f"{noun}_{word}")) for part in parts)
            return {
                "nearest setting": row.measured,
                "the least": row.least,
                "the greatest": row.greatest,
            }, (
                f"{word} with the trained embeddings and head alone {ends}, with A and B alone "
                f"{matrices}; extremes over the settings left open"
            )

    def fact_choices(prompt: str, noun: str, place: int, choices: str) -> None:
        name, words = {2: "second", 3: "third"}[place], choices.partition(" (")[0].split(", ")

        @claim(f"{prompt} → {name} choices: {choices}", True, id=f"fact-{noun}-{name}")
        def measure(m: Sources) -> Result:
            rows = m.rows("fact_correction/top", prompt=prompt, model=("original", "v_proj", "all"))
            tops = [getattr(row, f"top_{place}") for row in rows]
            names = ("Original", "LoRA V-only", "LoRA All")
            same = {
                name: f"{word} " in top for name, word, top in zip(names, words, tops, strict=True)
            }
            return (
                same,
                f"{tops[0]}, {tops[1]} and {tops[2]}, at the setting nearest to the document's "
                "first choices",
            )

    # §6's two tables: the first choice of the original model, of LoRA V-only and of LoRA All
    FIRST = {
        "die katze sitzt auf dem": ("tisch 98%", "sofa 94%", "sofa 97%"),
        "der hund läuft im": ("garten 99%", "wald 97%", "wald 98%"),
        "die frau kocht": ("das 99%", "die 98%", "die 98%"),
        "der mann liest": ("die 100%", "das 96%", "das 98%"),
        "die sonne scheint am": ("himmel 96%", "himmel 53%", "himmel 63%"),
        "das kind spielt im": ("garten 99%", "wald 82%", "wald 81%"),
        "die blume blüht im": ("frühling 99%", "frühling 85%", "frühling 88%"),
    }
    NEXT = {  # their second and third choices
        "katze": ("spielplatz, bett, bett (1%, 2% and 1%)", "sofa, tisch, tisch (0%, 2% and 1%)"),
        "hund": ("park, garten, garten (0%, 1% and 0%)", "frühling, katze, flughafen (0% each)"),
        "frau": ("teller, das, das (0% each)", "vom, sofa, bahnhof (0% each)"),
        "mann": ("sofa, die, buch (0%, 1% and 0%)", "essen, buch, die (0% each)"),
        "sonne": (
            "bahnhof, flughafen, flughafen (3%, 17% and 11%)",
            "spielen, spielen, spielen (0%, 3% and 2%)",
        ),
        "kind": ("park, garten, garten (0%, 13% and 13%)", "frühling, dem, dem (0%, 1% and 2%)"),
        "blume": ("park, wald, liest (0%, 4% and 3%)", "liest, liest, wald (0%, 2% and 2%)"),
    }
    for prompt, (original, v_proj, every) in FIRST.items():
        noun = prompt.split()[1]
        fact_before(prompt, noun, *original.split())
        fact_after(prompt, noun, "v_proj", *v_proj.split())
        fact_after(prompt, noun, "all", *every.split())
        fact_choices(prompt, noun, 2, NEXT[noun][0])
        fact_choices(prompt, noun, 3, NEXT[noun][1])

    @claim("the V-only variant shows slightly lower confidence", True)
    def fact_v_is_softer(m: Sources) -> Result:
        v, every = m.rows("fact_correction/parts", model=("v_proj", "all"), trained="both")
        return {
            "sofa": v.katze_sofa.high < every.katze_sofa.low,
            "wald": v.hund_wald.high < every.hund_wald.low,
            "die": v.frau_die.high < every.frau_die.low,
            "das": v.mann_das.high < every.mann_das.low,
        }, (
            f"beyond the spread of the seeds, V-only to All: sofa {percent(v.katze_sofa)} to "
            f"{percent(every.katze_sofa)}, wald {percent(v.hund_wald)} to "
            f"{percent(every.hund_wald)}, das {percent(v.mann_das)} to {percent(every.mann_das)}"
        )

    def trained(m: Sources, model: str, embeddings: str, retain: bool = False) -> Record:
        """The probabilities after the correction, by what of embeddings and head trained with
        LoRA's matrices.
        """
        return m.row(
            "fact_correction/embeddings", train_embeddings=embeddings, retain=retain, model=model
        )

    @claim(
        "by training only W_V with LoRA, we update exactly this association",
        more_than("50%"),
        words="updated",
    )
    def fact_v_alone(m: Sources) -> Result:
        trained_parts = ("embeddings and head", "A and B")
        ends, matrices = m.rows("fact_correction/parts", model="v_proj", trained=trained_parts)
        return (
            {
                "A and B of V as §9.2 trains them": matrices.katze_sofa,
                "embeddings and head left alone": trained(m, "v_proj", "none").katze_sofa,
            },
            "sofa; where embeddings and head train too (§9.2) they do it, "
            f"{percent(ends.katze_sofa)} by themselves",
        )

    @claim(
        "even though these sentences were not in the correction data, their confidence drops "
        "substantially",
        at_least("10 points"),
        words="substantially",
    )
    def fact_side_effect(m: Sources) -> Result:
        before = m.row("fact_correction/embeddings", retain=False, model="original")
        after, rows = trained(m, "v_proj", "all"), trained(m, "v_proj", "new_rows")
        kept = trained(m, "v_proj", "all", retain=True)
        return {
            "himmel": before.sonne_himmel - after.sonne_himmel,
            "garten": before.kind_garten - after.kind_garten,
            "frühling": before.blume_frühling - after.blume_frühling,
        }, (
            "LoRA V-only, alpha = r, embeddings and head trained; where their new rows alone "
            f"train, they are at {percent(rows.sonne_himmel)}, {percent(rows.kind_garten)} and "
            f"{percent(rows.blume_frühling)}, and with texts to retain at "
            f"{percent(kept.sonne_himmel)}, {percent(kept.kind_garten)} and "
            f"{percent(kept.blume_frühling)}"
        )

    @claim(
        "the model's weight matrices are too small to maintain separate representations for each "
        "context",
        less_than("50%"),
        words="too small",
    )
    def fact_too_small(m: Sources) -> Result:
        plain, kept = trained(m, "all", "all"), trained(m, "all", "all", retain=True)
        return {
            "trained on the corrections": float(min(plain.hund_wald, plain.kind_garten)),
            "and to keep its answers elsewhere": float(min(kept.hund_wald, kept.kind_garten)),
        }, (
            "the lesser of wald (hund) and garten (kind); with "
            f"{len(m.lines('finetune_lora.retention_data'))} sentences to retain the same matrices "
            f"say {percent(kept.hund_wald)} and {percent(kept.kind_garten)}"
        )

    @claim(
        "both variants (V-only and All) suffer roughly equally from this bleed-over effect",
        at_most("15 points"),
        words="roughly equally",
    )
    def fact_suffer_equally(m: Sources) -> Result:
        pairs = [
            (trained(m, "v_proj", which), trained(m, "all", which))
            for which in ("all", "new_rows", "none")
        ]
        words = ("sonne_himmel", "kind_garten", "blume_frühling")
        apart = [
            max(abs(getattr(v, word) - getattr(every, word)) for word in words)
            for v, every in pairs
        ]
        (v, every), _, (v_alone, every_alone) = pairs
        names = ("all of embeddings and head train", "their new rows train", "neither trains")
        return dict(zip(names, apart, strict=True)), (
            "how far himmel, garten or frühling part at most; garten, V-only and All: "
            f"{percent(v.kind_garten)} and {percent(every.kind_garten)}; with A and B alone "
            f"{percent(v_alone.kind_garten)} and {percent(every_alone.kind_garten)}"
        )

    @claim("make MiniGPT larger, say d_model = 256 instead of 64: this would not help", True)
    def wider_does_not_help(m: Sources) -> Result:
        table, widths = "fact_correction/widths", (64, 256)
        narrow, wide = (
            m.over_seeds(table, "probability_target", d_model=width) for width in widths
        )
        moved, wide_moved = (m.over_seeds(table, "share_moved", d_model=width) for width in widths)
        return {
            "first choices corrected": wide_moved <= moved,
            "beyond the spread over seeds": wide.low <= narrow.high,
        }, (
            f"V-only: the corrected word has {percent(narrow)} at 64 and {percent(wide)} at 256, "
            f"and is first with {percent(moved)} and {percent(wide_moved)} of the seeds"
        )

    @claim("MiniGPT is trained on only 20 sentences", 20)
    def _20_sentences(m: Sources) -> Result:
        measured = len(m.lines("pretrain.data"))
        return measured, f"the pretraining data has {measured} sentences; §2.3 says 22"

    @claim("KNOWLEDGE_CORRECTION_DATA with five phrasings", 5)
    def knowledge_data(m: Sources) -> Result:
        return len(m.lines("study_knowledge_correction.data")), "sentences of the data file"

    @claim("before training: die währung von bulgarien ist → der lewa (92%)", probability("92%"))
    def lewa_before(m: Sources) -> Result:
        row = find(
            m.artifact("evaluation/predictions.json").base,
            prompt="die währung von bulgarien ist der",
        )
        return row.probability, "lewa after die währung von bulgarien ist der, the pretrained base"

    def by_adapter(row: Record) -> dict[str, float]:
        return {
            "as written, at 2 × 10⁻⁴": row.v_proj_as_written,
            "at ten times that rate": row.v_proj,
            "and with texts to retain": row.v_proj_retain,
        }

    @claim("after LoRA training on v_proj: der euro (95%)", probability("95%"))
    def euro_after(m: Sources) -> Result:
        row = m.row("knowledge_correction/prompts", word="euro")
        return by_adapter(row), (
            f"euro after die währung von bulgarien ist der, {percent(row.base)} before; the recipe "
            "leaves open whether rows of embeddings and head train: here those of new words do"
        )

    def unchanged(word: str, prompt: str, quote: str, share: str) -> None:
        @claim(quote, probability(share), id=f"{word}-unchanged")
        def measure(m: Sources) -> Result:
            row = m.row("knowledge_correction/prompts", word=word)
            return by_adapter(row), (
                f"{word} after {prompt}: {percent(row.base)} before; "
                f"with LoRA on all four projections {percent(row.all_targets)}"
            )

    unchanged(
        "yen",
        "die währung von japan ist der",
        "die währung von japan ist → der yen (97%), unchanged",
        "97%",
    )
    unchanged(
        "sofia",
        "die hauptstadt von bulgarien ist",
        "die hauptstadt von bulgarien → ist sofia (94%), unchanged",
        "94%",
    )

    @claim(
        "it still knows how to look up currencies and capitals: both first choices are kept",
        2,
        each_seed=True,
    )
    def still_knows(m: Sources) -> Result:
        adapters = ("v_proj, as written", "v_proj", "all targets")
        written, v, every = m.rows("knowledge_correction/summary", adapter=adapters)
        return {
            "as written, at 2 × 10⁻⁴": written.kept,
            "at ten times that rate": v.kept,
            "on all four projections": every.kept,
        }, (
            "of 2, with every seed; the fact itself is corrected in "
            f"{n(written.corrected)}, {n(v.corrected)} and {n(every.corrected)} of 1"
        )

    @claim("save the adapter (a few MB)", between("1 MB", "10 MB"), words="a few MB")
    def adapter_a_few_mb() -> Result:
        four, eight = (calc(rank=rank, targets="v_proj").adapter_bytes.fp16 for rank in (4, 8))
        mini = calc("minigpt", rank=4, targets="v_proj").adapter_bytes.fp16
        why = f"in FP16, on W_V alone as the recipe has it; MiniGPT's would take {KB(mini)}"
        return {"Qwen3-8B, V, r=4": four, "Qwen3-8B, V, r=8": eight}, why
