//! One rank's part: it checks a shape, times it, and checks it again.

use std::time::Instant;

use a2a::abi::types::*;
use serde::{Deserialize, Serialize};

use crate::conformance::common::*;
use crate::gate::Gate;
use crate::routing::Routing as Choices;
use crate::shape::{Pair, Shape};

/// What a rank measured of one shape.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// By cache ("warm", "cold") and operation ("dispatch", "combine", "pair"): microseconds, an entry an iteration.
    pub times: Vec<(String, String, Vec<f64>)>,
    /// Distinct (token, rank) rows that this rank sends, and that it receives.
    pub rows_sent: u64,
    pub rows_received: u64,
    /// Bytes that one dispatch, and one combine, of this rank moved between windows.
    pub dispatch_wire: u64,
    pub combine_wire: u64,
}

/// The job of a rank process.
pub fn job(seat: &Seat) -> Result<(), String> {
    let shape: Shape = serde_json::from_str(&seat.args[0]).map_err(|error| error.to_string())?;
    shape.leave(seat.rank, &measure(seat, &shape)?)
}

/// All ranks meet: an empty dispatch on a comm of its own returns when everybody has called it.
pub struct Meeting {
    comm: Comm,
    routing: Routing,
}

impl Meeting {
    pub fn new(seat: &Seat) -> Result<Meeting, String> {
        let mut config = config(seat);
        config.num_experts = seat.world as i32;
        (config.max_topk, config.max_hidden, config.max_tokens) = (1, 8, 1);
        // A name is used for one comm: this one's differs in address and key (a2a_unique_id_t's bytes 10 and 119).
        config.unique_id.bytes[10] ^= 0x5a;
        config.unique_id.bytes[119] ^= 0x5a;
        let comm = Comm::create(&config)?;
        let routing = comm.routing(0)?;
        Ok(Meeting { comm, routing })
    }
    pub fn wait(&self) -> Result<(), String> {
        let input = DispatchIn {
            tokens: Some(Tensor::new(BF16, &[0, 8])),
            topk_ids: Some(Tensor::new(I32, &[0, 1])),
            ..Default::default()
        };
        self.comm.dispatch(&self.routing, A2A_PHASE_BOTH, &input, &mut DispatchOut::default())?;
        Ok(())
    }
}

/// A step's tensors, made once.
struct Step<'a> {
    comm: &'a Comm,
    routing: Routing,
    input: DispatchIn,
    output: DispatchOut,
    results: Option<Tensor>,
    sums: CombineOut,
    /// Asked for again after every dispatch, since that is when it is valid.
    zero_copy: Option<Dtype>,
}

impl Step<'_> {
    fn dispatch(&mut self) -> Result<(), String> {
        self.comm.dispatch(&self.routing, A2A_PHASE_BOTH, &self.input, &mut self.output)?;
        Ok(())
    }
    fn combine(&mut self) -> Result<(), String> {
        if let Some(dtype) = self.zero_copy {
            self.results = Some(self.comm.combine_buffer(&self.routing, dtype)?);
        }
        self.comm.combine(&self.routing, A2A_PHASE_BOTH, 0, self.results.as_ref(), &mut self.sums)?;
        Ok(())
    }
}

fn measure(seat: &Seat, shape: &Shape) -> Result<Measured, String> {
    let pair = Pair::named(&shape.pair)?;
    let (tokens, hidden, topk) = (shape.tokens, shape.hidden, shape.topk);
    let mut config = config(seat);
    (config.backend, config.layout) = (pair.backend, pair.layout);
    config.num_experts = shape.experts as i32;
    (config.max_topk, config.max_hidden, config.max_tokens) =
        (topk as i32, hidden as i32, tokens.max(1) as i32);
    shape.kind.configure(&mut config);
    config.max_recv_rows = shape.max_recv_rows;
    let meeting = Meeting::new(seat)?;
    let comm = Comm::create(&config)?;

    let gate = Gate::new(seat, shape, pair, &Choices::parse(&shape.routing)?)?;
    let capacity = comm.info()?.row_capacity as usize;
    let own = |dtype: Dtype, columns: usize| match pair.keeps_rows() {
        true => Some(Tensor::view()),
        false => Some(Tensor::new(dtype, &[capacity, columns])),
    };
    let by_expert = pair.oracle_layout().by_expert();
    let output = DispatchOut {
        tokens: own(shape.kind.wire(), hidden),
        scales: shape.kind.scale().and_then(|scale| own(F32, scale.row_bytes(hidden) / 4)),
        topk_ids: if by_expert { None } else { own(I32, topk) },
        topk_weights: own(F32, topk),
        row_source: own(I32, 2),
        expert_counts: Some(Tensor::view()),
        expert_offsets: by_expert.then(Tensor::view),
        ..Default::default()
    };
    let zero_copy = (pair.keeps_rows() && !shape.staged).then_some(shape.kind.dtype());
    let sums =
        CombineOut { tokens: Some(Tensor::new(shape.kind.dtype(), &[tokens, hidden])), ..Default::default() };
    let mut step = Step {
        comm: &comm,
        routing: comm.routing(0)?,
        input: gate.input(),
        output,
        results: None,
        sums,
        zero_copy,
    };

    let check = |step: &mut Step| -> Result<[u64; 2], String> {
        let moved = |stats: a2a_stats_t| {
            [stats.bytes_pushed + stats.bytes_gathered + stats.bytes_fifo, stats.bytes_pulled]
        };
        let before = moved(comm.stats()?);
        step.dispatch()?;
        gate.check_received(&step.output)?;
        let sent = moved(comm.stats()?);
        let mut results = match zero_copy {
            Some(dtype) => comm.combine_buffer(&step.routing, dtype)?,
            None => Tensor::new(shape.kind.dtype(), &[capacity, hidden]),
        };
        gate.write_results(&mut results);
        step.results = Some(results);
        step.combine()?;
        gate.check_sums(step.sums.tokens.as_ref().expect("wanted"))?;
        let pulled = moved(comm.stats()?);
        let fifo = pulled[0] - sent[0];
        Ok([sent[0] - before[0], pulled[1] - sent[1] + fifo])
    };
    let [dispatch_wire, combine_wire] = check(&mut step)?;
    let (rows_sent, rows_received) = gate.rows();
    let mut measured = Measured { times: Vec::new(), rows_sent, rows_received, dispatch_wire, combine_wire };

    let mut cold = vec![0u8; if shape.caches.iter().any(|cache| cache == "cold") { 64 << 20 } else { 0 }];
    for cache in &shape.caches {
        let mut prepare = || {
            if cache == "cold" {
                // A rank that is done must not take the core of one that is still being timed.
                meeting.wait()?;
                cold.iter_mut().step_by(64).for_each(|byte| *byte = byte.wrapping_add(1));
                std::hint::black_box(&cold);
            }
            meeting.wait()
        };
        let timed = |act: &mut dyn FnMut() -> Result<(), String>| -> Result<f64, String> {
            let start = Instant::now();
            act()?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        };
        let (mut dispatch, mut combine, mut both) = (Vec::new(), Vec::new(), Vec::new());
        for iteration in 0..shape.warmup + shape.iterations {
            prepare()?;
            let sent = timed(&mut || step.dispatch())?;
            prepare()?;
            let summed = timed(&mut || step.combine())?;
            prepare()?;
            let chained = timed(&mut || {
                step.dispatch()?;
                step.combine()
            })?;
            if iteration >= shape.warmup {
                dispatch.push(sent);
                combine.push(summed);
                both.push(chained);
            }
        }
        for (operation, times) in [("dispatch", dispatch), ("combine", combine), ("pair", both)] {
            measured.times.push((cache.clone(), operation.into(), times));
        }
    }
    // What was right before the clock ran must still be.
    check(&mut step)?;
    meeting.wait()?;
    Ok(measured)
}
