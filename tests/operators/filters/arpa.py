"""A small n-gram model in ARPA form, with words and Chinese characters."""

ARPA = """\\data\\
ngram 1=9
ngram 2=6

\\1-grams:
-1.5\t<unk>
0\t<s>\t-0.3
-1.1\t</s>
-1.2\tthe\t-0.4
-1.4\tcat\t-0.2
-1.6\tsat\t-0.2
-1.3\t炉\t-0.5
-1.7\t火\t-0.1
-2.0\t0\t-0.1

\\2-grams:
-0.4\t<s> the
-0.5\tthe cat
-0.6\tcat sat
-0.7\tsat </s>
-0.3\t<s> 炉
-0.2\t炉 火

\\end\\
"""
