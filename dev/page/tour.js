// tour.js: the tour's stops. Each sets the controls and runs to a step; what it says of numbers is filled in as they are
// measured: {post.ratio} is page.js's fact of that name; {line sum} opens a formula's line. No stop promises an order that another seed would change.
"use strict";

const STOPS = [
  { name: "a new model", until: 1, settings: { norms: ["post", "keel"], L: 64 }, text: `
    <p>Both models are new. One step has been taken, and the gradient is that of the weights they were born with.</p>
    <p>It reaches the bottom of both: of its norm at the last sub-layer, sub-layer 2 sees {post.ratio} in Post-LN and {keel.ratio} in KEEL. So far nothing is wrong with Post-LN.</p>
    <p>But look at <b>the shortcut’s product</b>. The outer norm divides by the length of x + F, sub-layer after sub-layer: Post-LN’s shortcut alone keeps {post.product} (the paper’s estimate, for
    branches as long as x, is {estimate}), KEEL’s {keel.product} ({line factor}). In a new model random branches carry the rest of the gradient down. It will not last.</p>` },
  { name: "fifty steps", until: 50, settings: { norms: ["post", "keel"], L: 64 }, text: `
    <p>First a model learns how frequent each byte is. For that every position needs the same vector, so all branches learn to add it, and <b>all positions become alike</b>: of Post-LN’s x
    {post.same} is common to all positions (mean over the sub-layers), of KEEL’s {keel.same}.</p>
    <p>Branches that agree with x make x + F longer, and the outer norm divides the gradient by that length, once a sub-layer ({line estimate}). Now sub-layer 2 sees {post.ratio} of the last one’s gradient in Post-LN,
    {keel.ratio} in KEEL. What is below hardly learns any more: watch whether Post-LN’s loss, {post.loss}, leaves what byte frequencies give, {entropy}.</p>` },
  { name: "why α", until: 50, settings: { norms: ["post", "scaledpost", "keel"], L: 64 }, text: `
    <p>Give the shortcut a weight: Norm(αx + F) ({line sum}). The norm divides by about √(α² + 1) what α has multiplied, so a sub-layer keeps α/√(α² + 1), and L of them, with α = L, keep {limit} ({line limit}).
    As branches agree, they cost a bounded factor in all, not a factor each.</p>
    <p>Scaled Post-LN is this and no more, the paper’s first attempt; its gradient at sub-layer 2 is {scaledpost.ratio} of the last one’s, and KEEL’s is {keel.ratio}, where Post-LN has {post.ratio}.
    KEEL also norms what the branch reads. That is not for the gradient over depth: the paper found that without it the loss lags. Run on, with more than one seed, to compare losses:
    {scaledpost.loss} and {keel.loss} now.</p>` },
  { name: "turn α to 1", until: 50, settings: { norms: ["post", "keel"], L: 64, alpha: 1 }, text: `
    <p>All of KEEL’s norms are in place, but its shortcut weighs 1, as Post-LN’s does. After fifty steps sub-layer 2 sees {keel.ratio} of the last one’s gradient, where Post-LN’s sees {post.ratio}.</p>
    <p>So it is the weight that saves it, not the norms. Now move α up, to 4, 16, 64, and run again: how much is enough? And how much is too much for so small a model, whose branches then
    move x by one part in α?</p>` },
  { name: "raise the rate", until: 150, settings: { norms: ["post", "deepnorm", "pre", "keel"], L: 32, lr: 1e-2 }, text: `
    <p>Twice the learning rate, and two more in the race. A loss that jumps and comes back is alive; one that stays at {entropy} knows byte frequencies and nothing else. Means of the last steps:
    Post-LN {post.loss}, DeepNorm {deepnorm.loss}, Pre-LN {pre.loss}, KEEL {keel.loss}.</p>
    <p>Raise it further and see who breaks next. It depends on the seed and on the warm-up, so take others before you believe what you see: with ten steps of warm-up KEEL too has been seen stuck at
    3·10⁻², where Pre-LN still learnt; on the slow ramp of <a href="lesson.html#maxlr">the lesson</a> KEEL bore more with every seed, as in the paper’s Table 1 (64 layers of 1024 channels: KEEL 1.01·10⁻²,
    Pre-LN 7.65·10⁻³, DeepNorm 3.5·10⁻⁴, Post-LN 3.0·10⁻⁴).</p>` },
  { name: "128 sub-layers", until: 40, settings: { norms: ["post", "pre", "keel"], L: 128 }, text: `
    <p>Twice as deep, and α = 128. The paper’s estimate for Post-LN’s shortcut is now {estimate}; measured, {post.product}, and of the gradient itself {post.ratio}. KEEL’s is {keel.ratio}:
    with α = L its bound does not fall with depth.</p>
    <p>Pre-LN’s gradient passes as well ({pre.ratio}): its shortcut has no norm on it at all. What Pre-LN pays is elsewhere: x grows from sub-layer to sub-layer, so that each has less
    to say than the one before.</p>` },
];
