"""`python -m recipes.benchmarks.decode`"""

import sys

from recipes.benchmarks.decode.scheduler import main

main(sys.argv[1:])
