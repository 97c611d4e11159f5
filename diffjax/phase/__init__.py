"""Linear SDEs of data with auxiliary variables (momentum), and what samples and trains them."""

from diffjax.phase.bridge import bridge as bridge
from diffjax.phase.exponential import exponential as exponential
from diffjax.phase.flexible import flexible as flexible
from diffjax.phase.flexible import metric_bound as metric_bound
from diffjax.phase.flexible import metric_noised as metric_noised
from diffjax.phase.likelihood import bound as bound
from diffjax.phase.likelihood import noised as noised
from diffjax.phase.linear_sde import linear_sde as linear_sde
from diffjax.phase.processes import cld as cld
from diffjax.phase.processes import psld as psld
from diffjax.phase.processes import recipe as recipe
from diffjax.phase.splitting import euler_maruyama as euler_maruyama
from diffjax.phase.splitting import sscs as sscs
from diffjax.phase.splitting import symplectic as symplectic
from diffjax.phase.stochastic import oba as oba
