//! The strategy's parameters, which follow from the sizes.

/// Weights and learning rates, by their usual names.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// Weight of each rank, the best first: the better half's are positive and sum to 1, the others are negative.
    pub weights: Vec<f64>,
    /// Variance-effective size of the better half.
    pub mueff: f64,
    /// Rate of the path for the rank-one update.
    pub cc: f64,
    /// Rate of the rank-one update.
    pub c1: f64,
    /// Rate of the rank-mu update.
    pub cmu: f64,
    /// Rate of the step size's path.
    pub cs: f64,
    /// Damping of the step size.
    pub damps: f64,
    /// Generations after which axes are due to be brought up to date.
    pub gap: f64,
}

impl Parameters {
    /// The defaults for `dimension` and `population`.
    pub fn new(dimension: usize, population: usize) -> Self {
        let (n, lambda) = (dimension as f64, population as f64);
        let raw = |rank: usize| ((lambda + 1.0) / 2.0).ln() - (rank as f64).ln();
        let mut weights: Vec<f64> = (1..=population).map(raw).collect();
        let mu = weights.iter().filter(|w| **w > 0.0).count();
        let (better, worse) = weights.split_at_mut(mu);
        scale_to(better, 1.0);
        let mueff = effective(better);

        let cc = (4.0 + mueff / n) / (n + 4.0 + 2.0 * mueff / n);
        let c1 = (lambda / 6.0).min(1.0) * 2.0 / ((n + 1.3).powi(2) + mueff);
        let cmu = (2.0 * (0.25 + mueff + 1.0 / mueff - 2.0) / ((n + 2.0).powi(2) + mueff)).min(1.0 - c1);
        let cs = ((mueff + 2.0) / (n + mueff + 3.0)).min(0.5);
        let inner = (3.0 * (1.0 - 0.5f64.powf(n / 9.0))).max(1.0);
        let damps = 1.0 + 2.0 * (inner * ((mueff - 1.0) / (n + 1.0)).sqrt() - 1.0).max(0.0) + cs;

        // No decay of the covariance over all, no faster unlearning than the sample justifies, and positive definite.
        let balanced = 1.0 + c1 / cmu;
        let justified = 1.0 + 2.0 * effective(worse) / (mueff + 2.0);
        let definite = (1.0 - c1 - cmu) / cmu / n;
        scale_to(worse, -balanced.min(justified).min(definite));
        Parameters {
            mueff,
            cc,
            c1,
            cmu,
            cs,
            damps,
            gap: 1.0 / (c1 + cmu) / n / 10.0,
            weights,
        }
    }
}

fn scale_to(weights: &mut [f64], sum: f64) {
    let factor = sum / weights.iter().sum::<f64>();
    weights.iter_mut().for_each(|w| *w *= factor);
}

fn effective(weights: &[f64]) -> f64 {
    weights.iter().sum::<f64>().powi(2) / weights.iter().map(|w| w * w).sum::<f64>()
}
