"""Two papers' claims about penalties on weights, put to the test: `python -m studies.regularizers norm` and `energy`.

norm      Yoshida & Miyato, arXiv:1705.10941: spectral norm regularization gives a smaller gap between training and test, and
          less sensitivity to the input, than no penalty and than weight decay.
energy    Liu et al., arXiv:1805.09298, and Lin et al., arXiv:1906.04892: test accuracy rises from no penalty to minimum
          hyperspherical energy (MHE) to its compressive form (CoMHE).

The protocol is one for all arms of a study, and was fixed before its results were seen. Short trials on seeds 0 to 2 came
first: after them the adversary's step was made smaller, in the library, the grid longer by 0.01, and the seeds ten.

- Data: digits, all ten, 100 images a class to train on, so that there is a gap; 100 a class to choose coefficients by, the
  same for all seeds and in no other part of any seed; all that is left to test on.
- Network: three 3x3 convolutions of stride 2 with ReLU, then a linear layer. Without batch norm for `norm`: with it the
  function does not change with the length of a weight, and a spectral norm says little. With batch norm for `energy`, as in
  the public code: the energy sees directions only.
- Training: SGD with momentum 0.9, cosine schedule to zero, no augmentation, 5e-4 weight decay on matrices in every arm of
  `energy` and none in `norm`. A seed draws split, initial weights and batches, so arms are compared in pairs.
- Coefficient: for each arm the best of the published one times 0.01, 0.1, 1, 10 and 100, by mean validation accuracy over two
  seeds that are not reported; the smaller one where two are equal.
- Verdict: on the 95 % interval (Student's t) of the paired difference over the seeds, see `claims`.

config    every flag, its default and its rules        measure   what is measured of a trained network
arms      what each arm adds to the loss               claims    the claims and the rule of the verdict
model     the network;  data: the split                study     all arms, coefficients and seeds, saved as it goes
train     the training loop                            report, figures
"""
