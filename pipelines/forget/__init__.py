"""`danlu forget`: takes documents out of a run, with all that was made from them, and tells which models saw them.

search    which rows of which files are a document or descend from it; which models saw it
rewrite   the same files without those rows, and the records that name them
packed    packed sequences without the pieces of a document
replies   cached replies that quote it
redo      what makes the change whole: everything is written first, then one record, after which it is only carried out
takedown  the order of it all, and what the command prints
"""
