import sys

from etude.analysis.command import main

sys.exit(main(sys.argv[1:]))
