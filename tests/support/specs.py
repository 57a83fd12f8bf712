"""The few specs that most properties are tried on, by their names in `paged.testing`."""

from paged.testing.specs import BROUGHT as BROUGHT
from paged.testing.specs import ODD as ODD
from paged.testing.specs import PHASES as PHASES
from paged.testing.specs import PLAIN as PLAIN
from paged.testing.specs import RICH as RICH
from paged.testing.specs import SPECS as SPECS
from paged.testing.specs import case_of as case_of
from paged.testing.specs import not_every_head as not_every_head
from paged.testing.specs import not_fifth as not_fifth
from paged.testing.specs import real as real
from paged.testing.specs import table_bias as table_bias
