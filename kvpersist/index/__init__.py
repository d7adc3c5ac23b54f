"""Indexes: declared on a collection, kept by every write, read instead of scans.

``declaration`` what a user declares; ``fields`` from a record's fields to parts of keys;
``definitions`` what is stored about a collection's indexes, and their states; ``writer`` with
``atomic_writer`` and ``ordered_writer`` the two ways of writing a record with its entries;
``reads`` queries; ``rebuild`` building, dropping and verifying.
"""

from kvpersist.index.declaration import BoundIndex, Index, Range, Spec, at_least, at_most, between, bind

__all__ = ["BoundIndex", "Index", "Range", "Spec", "at_least", "at_most", "between", "bind"]
