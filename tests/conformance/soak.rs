//! Many steps on a GPU, each of them checked whole: layers of different shapes take turns on two slots, by replayed graphs
//! and by plain calls, so that everything a step leaves behind lies in the way of another one.
//!
//! A2A_TEST_STEPS says how many. In a jitter build (CONTRIBUTING.md) kernels sleep around flags, and what a step has not
//! written is NaN.

use super::common::cuda::{self, Graph};
use super::graphs::{BATCH, Form, Layer, nothing_on_record};
use super::*;

const STEPS: usize = 2000;
/// Of the ranks whose number is past what kernels know by heart.
const STEPS_OF_MANY: usize = 400;
/// More than kNearRanks, and each a stream: a GPU tells 32 apart.
const MANY: usize = 18;
/// What a step may take on average, where kernels sleep.
const PATIENCE: Duration = Duration::from_millis(3);

/// Even layers are on slot 0 and have a graph, odd ones on slot 1, where nothing is captured.
const LAYERS: usize = 8;
const HIDDENS: [usize; LAYERS] = [64, 512, 128, 64, 256, 64, 512, 128];

/// Adds the tests to the others.
pub fn add(add: &mut impl FnMut(String, Left, Run)) {
    for backend in BACKENDS {
        for (name, world, steps) in [("soak", 4, steps()), ("soak_of_many", MANY, STEPS_OF_MANY)] {
            let left = move || backend.refused_here();
            let run = move || {
                let limit = GPU_LIMIT + PATIENCE * steps as u32;
                threads(world, limit, move |seat| soak(seat, backend, steps))
                    .map_err(|error| format!("A2A_TEST_SEED={}\n{error}", seed()))
            };
            add(format!("gpu/{name}/{}", backend.name()), Box::new(left), Box::new(run));
        }
    }
}

fn steps() -> usize {
    std::env::var("A2A_TEST_STEPS").map_or(STEPS, |steps| steps.parse().expect("A2A_TEST_STEPS is a number"))
}

fn form(world: usize, layer: usize) -> Form {
    let mut rng = Rng::new(&[seed(), 330, world as u64, layer as u64]);
    let mut tokens = |_| if layer == 0 { M } else { rng.pick(&[0, 1, 2, 7, 8, 9, M - 1, M]) };
    Form {
        tokens: (0..world).map(&mut tokens).collect(),
        experts: 2 * world + 1,
        hidden: HIDDENS[layer],
        topk: 1 + layer % 4,
        owns: layer / 2 % 2 == 1,
        told: layer.is_multiple_of(3),
    }
}

/// What a rank does in a step.
struct Plan {
    layer: usize,
    /// A dispatch goes before it that nobody combines.
    twice: bool,
    replays: bool,
    halves: bool,
    step: oracle::Step,
}

fn soak(seat: &Seat, backend: Backend, steps: usize) -> Result<(), String> {
    let mut config = small(seat, backend);
    config.num_experts = form(seat.world, 0).experts as i32;
    config.max_hidden = HIDDENS.into_iter().max().expect("layers") as i32;
    let comm = Comm::create(&config)?;
    let forms: Vec<Form> = (0..LAYERS).map(|layer| form(seat.world, layer)).collect();
    let mut layers = Vec::with_capacity(LAYERS);
    for (at, form) in forms.iter().enumerate() {
        layers.push(Layer::of(form.clone(), seat, backend, &comm, at as i32 % 2)?);
    }
    meet(seat)?;
    for (at, layer) in layers.iter_mut().enumerate() {
        let step = forms[at].step(backend, at);
        layer.ordinary(&step).map_err(|error| format!("layer {at}, an ordinary step: {error}"))?;
    }
    meet(seat)?;
    let mut graphs = Vec::with_capacity(LAYERS / 2);
    for layer in layers.iter_mut().step_by(2) {
        graphs.push(Graph::capture(|| layer.whole())?);
    }
    meet(seat)?;

    let plan = |number: usize| {
        // Which layer, and how many dispatches, is everybody's; how is each rank's own.
        let mut all = Rng::new(&[seed(), 331, backend as u64, number as u64]);
        let mut own = Rng::new(&[seed(), 332, backend as u64, number as u64, seat.rank as u64]);
        let layer = all.below(LAYERS);
        Plan {
            layer,
            twice: all.one_in(8),
            replays: layer.is_multiple_of(2) && !own.one_in(4),
            halves: own.one_in(2),
            step: forms[layer].step(backend, number),
        }
    };
    for first in (0..steps).step_by(BATCH) {
        let plans: Vec<Plan> = (first..steps.min(first + BATCH)).map(plan).collect();
        for (at, plan) in plans.iter().enumerate() {
            layers[plan.layer].enqueue_at(at, &plan.step);
        }
        cuda::deferred(|| -> Result<(), String> {
            for (at, plan) in plans.iter().enumerate() {
                let layer = &mut layers[plan.layer];
                layer.feed(at)?;
                if plan.twice {
                    layer.dispatch(A2A_PHASE_BOTH)?;
                }
                match plan {
                    Plan { replays: true, .. } => graphs[plan.layer / 2].launch(1)?,
                    Plan { halves: true, .. } => layer.halves()?,
                    _ => layer.whole()?,
                }
                layer.log(at)?;
            }
            Ok(())
        })?;
        cuda::synchronize()?;
        nothing_on_record(&comm)?;
        for (at, plan) in plans.iter().enumerate() {
            let Plan { layer, twice, replays, halves, step } = plan;
            layers[*layer].check_logged(at, step).map_err(|error| {
                let how = format!("twice {twice}, replays {replays}, halves {halves}");
                format!("step {} (layer {layer}, {how}): {error}", first + at)
            })?;
        }
    }
    meet(seat)
}
