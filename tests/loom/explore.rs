//! Running a model: through every order, or until it fails.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Once};
use std::time::Instant;

/// What loom says of a cell that is touched without an order.
pub const RACE: &str = "Causality violation";
/// What loom says of a model that never ends.
pub const ENDLESS: &str = "exceeded maximum number of branches";

/// How often each outcome of a model was met, over all its orders.
#[derive(Clone, Default)]
pub struct Outcomes(Arc<[AtomicUsize; 3]>);

impl Outcomes {
    pub fn met(&self, outcome: usize) {
        self.0[outcome].fetch_add(1, Relaxed);
    }
    /// None of the first `count` was missed: a model that never gets to one says nothing about it.
    pub fn assert_all(&self, count: usize) {
        for (outcome, met) in self.0[..count].iter().enumerate() {
            assert!(met.load(Relaxed) > 0, "outcome {outcome} was never met");
        }
    }
}

/// Runs a model under every order.
pub fn explore(name: &str, model: impl Fn() + Sync + Send + 'static) {
    let orders = Arc::new(AtomicUsize::new(0));
    let counted = orders.clone();
    let start = Instant::now();
    loom::model::Builder::new().check(move || {
        counted.fetch_add(1, Relaxed);
        model();
    });
    println!("{name}: {} orders, {:.2} s", orders.load(Relaxed), start.elapsed().as_secs_f64());
}

thread_local! {
    /// A panic on this thread is what is asked for.
    static BREAKS: Cell<bool> = const { Cell::new(false) };
}

/// Runs a model that must fail, with a message that has `sentence` in it.
pub fn breaks(name: &str, sentence: &str, model: impl Fn() + Sync + Send + 'static) {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !BREAKS.get() {
                tell(panic);
            }
        }));
    });
    BREAKS.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| loom::model(model)));
    BREAKS.set(false);
    let Err(panic) = outcome else { panic!("{name}: held in every order") };
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("a panic without words");
    assert!(text.contains(sentence), "{name}: failed with {text:?}, not {sentence:?}");
}
