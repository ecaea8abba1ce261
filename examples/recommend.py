"""Recommend, add an event, recommend again, filter: python examples/recommend.py BUNDLE."""

import sys

from unipinrec.runtime import Bundle, CacheOptions, Event, Recommender, RecommendOptions


def main(folder: str) -> None:
    """Answer three requests of one user."""
    bundle = Bundle.open(folder)
    first, second, *_ = bundle.item_ids
    action = bundle.manifest.actions[0]
    history = [Event(item=first, actions=(action,)), Event(item=second, actions=())]
    with Recommender.load(bundle, cache=CacheOptions(budget_bytes=64 << 20)) as recommender:
        slate = recommender.recommend(history, k=3, user="ada")
        print(f"{slate.kv} ({slate.kv_reason}):", [item.item for item in slate.items])

        # The whole history comes with each request; the cache keeps its keys and values.
        clicked = slate.items[0].item
        history.append(Event(item=clicked, actions=(action,)))
        slate = recommender.recommend(history, k=3, user="ada")
        print(f"{slate.kv} ({slate.kv_reason}):", [item.item for item in slate.items])

        without = RecommendOptions(exclude=(slate.items[0].item,))
        slate = recommender.recommend(history, k=3, options=without, user="ada")
        print(f"{slate.kv}, without {without.exclude[0]}:", [item.item for item in slate.items])


if __name__ == "__main__":
    main(sys.argv[1])
