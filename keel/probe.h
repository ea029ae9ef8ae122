// keel/probe.h: what --probe writes.
#pragma once

#include "folder.h"

// Every probed step adds a row for each sub-layer to probe.csv and one for each parameter tensor to probe_weights.csv.
//
// The shortcut of sub-layer l is the map x_l -> RMSNorm(alpha x_l + F; gamma) with F held fixed. Its Jacobian at one
// row is
//
//     diag(gamma_l) (alpha_l / rms(z_l)) (I - zh zh^T / C),   zh = z_l / rms(z_l)
//
// The last factor takes away the one direction of C that would only change z's length; what is left is the diagonal
// matrix whose entries alpha gamma / rms(z) the paper's eq. 14-19 estimate, with rms(z) = sqrt(alpha^2 + 1). Here
// rms(z) is each row's own and gamma each channel's own:
//
//     shortcut_gain         mean over rows of ||A_l||_F / sqrt(C), where A_l = diag(alpha_l gamma_l / rms(z_l)), or
//                           alpha_l I without an outer norm
//     shortcut_gain_to_top  mean over rows of ||A_{L-1} ... A_l||_F / sqrt(C)
//
// The product is taken row by row and channel by channel, and averaged after: the product of the averages is another
// number. A product of diagonal matrices with entries a_i g_c has the norm |prod a_i| ||prod g_c||, so the factors of
// the rows and those of the channels are multiplied up apart.
//
//     same_x                ||mean over rows of x_l||^2 / mean over rows of ||x_l||^2: the share of x_l that all
//                           positions of all sequences have in common, 1 where they hold the same vector

// Sums for one sub-layer over the micro-batches of a step.
struct ProbeSums { double x = 0, f = 0, z = 0, dx = 0, df = 0; };  // squares of x_l, F(u_l), z_l, dL/dx_l and dL/dF_l
struct SublayerProbe : ProbeSums {
    // over rows: alpha_l / rms(z_l), and its product over the sub-layers from l on
    double shortcut = 0, shortcut_to_top = 0;
};

struct StepProbe {
    std::vector<SublayerProbe> sublayers;  // (L)
    std::vector<double> x_sums;            // (L,C): x_l summed over rows
    // (L): rms over channels of gamma_out_l, and of its product over the sub-layers from l on
    std::vector<double> gamma, gamma_to_top;
    // (tensors): squares of the weights before the update, of the gradients before the clip, of what the update adds
    std::vector<double> weights, gradients, updates;

    explicit StepProbe(const ModelConfig& c) : sublayers(size_t(c.L)), x_sums(size_t(c.L) * size_t(c.C)) {}

    // Adds the shortcut gains of one micro-batch. r (L,rows): 1 / rms(z_l), not read where there is no outer norm.
    template <class Real>
    void add_shortcuts(const ModelConfig& c, const Real* r, size_t rows) {
        std::vector<double> to_top(rows, 1.0);
        for (int l = c.L - 1; l >= 0; l--) {
            SublayerNorm norm = c.sublayer(l);
            double sum = 0, sum_to_top = 0;
            for (size_t i = 0; i < rows; i++) {
                double gain = double(norm.alpha) * (norm.norm_out ? double(r[size_t(l) * rows + i]) : 1);
                to_top[i] *= gain, sum += gain, sum_to_top += to_top[i];
            }
            sublayers[size_t(l)].shortcut += sum, sublayers[size_t(l)].shortcut_to_top += sum_to_top;
        }
    }

    // Adds up the sums of all ranks in rank order: a rank has those of its sequences, and of the gradients and updates
    // of the parameters that it owns. gather(mine, all, bytes) gives each rank what all have.
    template <class Gather>
    void add_ranks(int ranks, Gather gather) {
        std::vector<double> mine(sublayers.size() * sizeof(SublayerProbe) / sizeof(double) + x_sums.size() +
                                 gradients.size() + updates.size());
        auto exchange = [&](auto copy) {  // copy(values, where they are in a rank's row, elements)
            size_t at = 0, n = sublayers.size() * sizeof(SublayerProbe) / sizeof(double);
            copy(reinterpret_cast<double*>(sublayers.data()), at, n), at += n;
            copy(x_sums.data(), at, x_sums.size()), at += x_sums.size();
            copy(gradients.data(), at, gradients.size()), at += gradients.size();
            copy(updates.data(), at, updates.size());
        };
        exchange([&](double* values, size_t at, size_t n) { std::copy_n(values, n, mine.data() + at); });
        std::vector<double> all(mine.size() * size_t(ranks));
        gather(mine.data(), all.data(), mine.size() * sizeof(double));
        exchange([&](double* values, size_t at, size_t n) {
            for (size_t i = 0; i < n; i++) {
                values[i] = 0;
                for (int r = 0; r < ranks; r++) values[i] += all[size_t(r) * mine.size() + at + i];
            }
        });
    }

    // gamma_of(l): gamma_out_l (C) as the forward pass has read it, null where there is none.
    template <class GammaOf>
    void set_gains(const ModelConfig& c, GammaOf gamma_of) {
        std::vector<double> product(size_t(c.C), 1.0);
        gamma.assign(size_t(c.L), 1), gamma_to_top.assign(size_t(c.L), 1);
        for (int l = c.L - 1; l >= 0; l--) {
            double sum = 0, sum_to_top = 0;
            const auto* g = gamma_of(l);
            for (size_t k = 0; k < product.size(); k++) {
                double gain = g ? double(g[k]) : 1;
                product[k] *= gain, sum += gain * gain, sum_to_top += product[k] * product[k];
            }
            gamma[size_t(l)] = std::sqrt(sum / c.C), gamma_to_top[size_t(l)] = std::sqrt(sum_to_top / c.C);
        }
    }
};

// A row of probe.csv. An rms is over rows and channels, a norm over all elements, a sub-layer's grad_norm or
// update_norm over its tensors.
struct SublayerFigures {
    double rms_x, rms_f, rms_z, shortcut_gain, shortcut_gain_to_top, dx_norm, df_norm, grad_norm, update_norm, same_x;
};

inline std::vector<SublayerFigures> sublayer_figures(const RunConfig& run, const ParameterLayout& layout,
                                                     const StepProbe& probe) {
    size_t L = size_t(run.model.L), C = size_t(run.model.C);
    double rows = double(run.total_batch), elements = rows * double(C);
    std::vector<double> gradients(L), updates(L);
    for (size_t i = 0; i < layout.tensors.size(); i++)
        if (int l = layout.tensors[i].layer; l >= 0)
            gradients[size_t(l)] += probe.gradients[i], updates[size_t(l)] += probe.updates[i];
    std::vector<SublayerFigures> figures;
    for (size_t l = 0; l < L; l++) {
        const SublayerProbe& p = probe.sublayers[l];
        double sum_squares = 0;  // of the rows' sum
        for (size_t k = l * C; k < (l + 1) * C; k++) sum_squares += probe.x_sums[k] * probe.x_sums[k];
        figures.push_back({.rms_x = std::sqrt(p.x / elements),
                           .rms_f = std::sqrt(p.f / elements),
                           .rms_z = std::sqrt(p.z / elements),
                           .shortcut_gain = probe.gamma[l] * p.shortcut / rows,
                           .shortcut_gain_to_top = probe.gamma_to_top[l] * p.shortcut_to_top / rows,
                           .dx_norm = std::sqrt(p.dx),
                           .df_norm = std::sqrt(p.df),
                           .grad_norm = std::sqrt(gradients[l]),
                           .update_norm = std::sqrt(updates[l]),
                           .same_x = sum_squares / (rows * p.x)});
    }
    return figures;
}

struct ProbeLog {
    ProbeLog() = default;  // one that drops its rows, for the ranks that write no files
    // A new column comes last: a resume leaves it empty in the rows of an older program.
    static constexpr const char* COLUMNS = "step,sublayer,kind,rms_x,rms_f,rms_z,shortcut_gain,shortcut_gain_to_top,dx_"
                                           "norm,df_norm,grad_norm,update_norm,same_x";
    // sublayer -1: outside the blocks
    static constexpr const char* WEIGHT_COLUMNS = "step,sublayer,tensor,weight_norm,grad_norm,update_norm";
    CsvLog sublayers, weights;
    std::vector<SublayerFigures> last;  // (L), of the last step that was probed and finite
    ProbeLog(const std::string& folder, int64_t resume_step, bool copy_later)
        : sublayers(folder + "/probe.csv", COLUMNS, resume_step, copy_later),
          weights(folder + "/probe_weights.csv", WEIGHT_COLUMNS, resume_step, copy_later) {}
};

inline void write_probe(ProbeLog& log, const RunConfig& run, const ParameterLayout& layout, int64_t step,
                        const StepProbe& probe) {
    log.last = sublayer_figures(run, layout, probe);
    for (size_t l = 0; l < log.last.size(); l++) {
        const SublayerFigures& f = log.last[l];
        log.sublayers.row(format("%lld,%zu,%s,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g", step, l,
                                 is_attention(int(l)) ? "attention" : "feed-forward", f.rms_x, f.rms_f, f.rms_z,
                                 f.shortcut_gain, f.shortcut_gain_to_top, f.dx_norm, f.df_norm, f.grad_norm,
                                 f.update_norm, f.same_x));
    }
    for (size_t i = 0; i < layout.tensors.size(); i++)
        log.weights.row(format("%lld,%d,%s,%.6g,%.6g,%.6g", step, layout.tensors[i].layer,
                               tensor_rows[layout.tensors[i].id].name, std::sqrt(probe.weights[i]),
                               std::sqrt(probe.gradients[i]), std::sqrt(probe.updates[i])));
}
