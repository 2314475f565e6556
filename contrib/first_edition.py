"""The index of a first edition is taken over, once, at the first start on its folder."""

import logging

import lmdb

from mkv import LMDB, HTTPError, parse_record, require


async def take_over(index: LMDB) -> None:
    """Make its journal garbage: also what its dead were making, where no record names it."""
    try:
        journal = index.env.open_db(b"journal", create=False)
    except lmdb.NotFoundError:
        return  # it is of the second edition
    changes = []
    with index.env.begin() as txn:
        for key, entry in txn.cursor(journal):
            try:
                _owner, _since, files = entry.split(b" ")
                record = parse_record(files)
                require(not record.error, 500, record.error)
                row, _ = (await index.row(key)).waste(record.replicas)
                changes.append((index.garbage, key, row.garbage_text()))
            except (HTTPError, ValueError):
                logging.error("%a: %a in the journal is passed over", key, entry)
    index.save(changes)
    with index.env.begin(write=True) as txn:
        txn.drop(journal)
