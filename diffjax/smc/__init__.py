"""Sequential Monte Carlo over samplers: resampling, twists, the driver `steer`, weights of any drift to any target."""

from diffjax.smc.particles import lineage as lineage
from diffjax.smc.rates import log_weight_rate as log_weight_rate
from diffjax.smc.resampling import effective_size as effective_size
from diffjax.smc.resampling import log_mean as log_mean
from diffjax.smc.resampling import multinomial as multinomial
from diffjax.smc.resampling import normalised as normalised
from diffjax.smc.resampling import residual as residual
from diffjax.smc.resampling import scored as scored
from diffjax.smc.resampling import ssp as ssp
from diffjax.smc.resampling import stratified as stratified
from diffjax.smc.resampling import systematic as systematic
from diffjax.smc.resampling import transported as transported
from diffjax.smc.steering import Steered as Steered
from diffjax.smc.steering import steer as steer
from diffjax.smc.twists import difference as difference
from diffjax.smc.twists import maximum as maximum
from diffjax.smc.twists import reward as reward
from diffjax.smc.twists import total as total
