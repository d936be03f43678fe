"""What we found out, one question a folder: a protocol, the runs, and the page of the docs that they make.

`reproduction`: does the paper hold? `comparison`: which penalty, balance loss or controller? `regularizers`, `cnn_experts`:
do the sister papers? `gates`: are the gates of other people's models found? A study imports from `examples/`, never the
other way: there lies what a user copies.
"""
