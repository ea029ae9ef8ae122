// tour.js: the tour's stops. Each sets the controls and runs to a step; what it says of numbers is filled in as they are
// measured and stays when the race goes another way: {post.ratio} is page.js's fact of that name. {line sum} opens a
// formula's line, {look product: words} goes to a chart, {try alpha=4} runs the stop with another setting. No stop
// promises an order that another seed would change.
"use strict";

const STOPS = [
  { name: "a new model", until: 1, look: "product", settings: { norms: ["post", "keel"], L: 64 }, text: `
    <p>The gradient enters at the last sub-layer and runs down to the first. Divide its norm at sub-layer 2, the first that is like all others in KEEL, by that at the last: 1 means that all of it arrives.
    In the new models Post-LN has {post.ratio}, KEEL {keel.ratio}. So far nothing is wrong with Post-LN.</p>
    <p>But follow {look product: the shortcut alone}, past all branches. After each sum the norm divides by the length of x + F: of Post-LN’s gradient {post.product} is left (the paper’s estimate, for
    branches as long as x: {estimate}), of KEEL’s {keel.product} ({line factor}). In a new model the branches make up for it: random matrices send down about as much as the norms take. That is a
    balance, and nothing holds it.</p>` },
  { name: "fifty steps", until: 50, look: "flow", settings: { norms: ["post", "keel"], L: 64 }, text: `
    <p>First a model learns how frequent each byte is. For that every position needs the same vector, so all branches learn to add it, and {look same: positions become alike}: of Post-LN’s x
    {post.born} was common to all positions at birth, {post.same} is now; of KEEL’s {keel.born} and {keel.same}.</p>
    <p>Branches that agree with x make x + F longer, and the norm divides {look flow: the gradient} by that length, at each sub-layer ({line estimate}). Sub-layer 2 now has {post.ratio} of the last one’s
    in Post-LN, {keel.ratio} in KEEL.</p>
    <p>The losses do not yet tell: bytes’ frequencies alone give about {entropy}. Run on for some hundred steps, and see whose goes on falling.</p>` },
  { name: "why α", until: 50, look: "product", settings: { norms: ["post", "scaledpost", "keel"], L: 64 }, text: `
    <p>Give the shortcut a weight: Norm(αx + F) ({line sum}). The norm divides by about √(α² + 1) what α has multiplied, so a sub-layer keeps α/√(α² + 1), and all of them, with α = L, {limit}
    ({line limit}), if branches point anywhere. They agree, as you saw: {look product: measured}, KEEL’s shortcut keeps {keel.product}. That too is a bounded factor in all, not one for each sub-layer:
    Post-LN’s keeps {post.product}.</p>
    <p>Scaled Post-LN is this and no more, the paper’s first attempt, and its gradient lives: {scaledpost.ratio} arrives, of KEEL’s {keel.ratio}, of Post-LN’s {post.ratio}. KEEL also norms what the
    branch reads. That is not for the gradient: the paper found that without it the loss lags behind in the long run.</p>` },
  { name: "turn α to 1", until: 50, look: "flow", settings: { norms: ["post", "keel"], L: 64, alpha: 1 }, text: `
    <p>All of KEEL’s norms are in place, but its shortcut weighs 1, as Post-LN’s does. After fifty steps {look flow: sub-layer 2} has {keel.ratio} of the last one’s gradient, Post-LN’s {post.ratio}.
    Both have lost it; which has lost more is the seed’s doing.</p>
    <p>So norms alone do not save it. How much weight does? {try alpha=4} {try alpha=16} {try alpha=64}</p>` },
  { name: "raise the rate", until: 150, look: "loss", settings: { norms: ["post", "deepnorm", "pre", "keel"], L: 32, lr: 1e-2 }, text: `
    <p>32 sub-layers, 150 steps, twice the rate, two more in the race. A {look loss: loss} that jumps and comes back is alive; one that stays around {entropy} knows byte frequencies and nothing else.
    Means of the last ten steps: Post-LN {post.loss}, DeepNorm {deepnorm.loss}, Pre-LN {pre.loss}, KEEL {keel.loss}.</p>
    <p>Who breaks next? {try lr=0.02} {try lr=0.03} It depends on the seed and on the warm-up, so take others before you believe what you see: with ten steps of warm-up KEEL too has been seen stuck at
    0.03, where Pre-LN still learnt; on the slow ramp of <a href="lesson.html#maxlr">the lesson</a> KEEL bore more with every seed, as in the paper’s Table 1.</p>` },
  { name: "128 sub-layers", until: 40, look: "flow", settings: { norms: ["post", "pre", "keel"], L: 128 }, text: `
    <p>Twice as deep, α = 128, forty steps. The paper’s estimate for Post-LN’s shortcut is now {estimate}; {look product: measured}, it is {post.product}, and {look flow: {post.ratio}} of the whole
    gradient arrives, what the branches carry included.</p>
    <p>Of KEEL’s {keel.ratio} arrives: with α = L all branches together can cost a bounded factor, at any depth. Of Pre-LN’s {pre.ratio}, as its shortcut has no norm on it at all; what that costs it
    elsewhere is in <a href="lesson.html#depth">the lesson</a>.</p>` },
];
