package cli

import (
	"maps"
	"slices"
	"strings"
)

// Labels reads KEY=VALUE arguments. An empty value means that the label is to go.
func Labels(args []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, a := range args {
		k, v, ok := strings.Cut(a, "=")
		if !ok || k == "" {
			return nil, Usagef("label %q is not KEY=VALUE", a)
		}
		labels[k] = v
	}
	return labels, nil
}

// WriteLabels prints a label a record, sorted by key.
func (r *Records) WriteLabels(labels map[string]string) error {
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if err := r.Write(map[string]string{k: labels[k]}, k, labels[k]); err != nil {
			return err
		}
	}
	return r.Close()
}
