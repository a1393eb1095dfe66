import sys

from etude.scaling.command import main

sys.exit(main(sys.argv[1:]))
