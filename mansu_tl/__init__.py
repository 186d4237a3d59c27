from mansu_tl.circuit import edge_attribution
from mansu_tl.models import load, save
