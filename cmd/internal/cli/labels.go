package cli

import (
	"maps"
	"slices"
	"strings"
)

// Labels parses KEY=VALUE arguments. An empty value means to remove the label.
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

// WriteLabels prints a record with KEY and VALUE for each label, sorted by key.
func (r *Records) WriteLabels(labels map[string]string) error {
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		record := struct {
			Key   string `json:"key"`
			Value string `json:"value"`
		}{k, labels[k]}
		if err := r.Write(record, k, record.Value); err != nil {
			return err
		}
	}
	return r.Close()
}

// LabelPaths returns the field paths, "labels.KEY", of the labels.
func LabelPaths(labels map[string]string) []string {
	var paths []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		paths = append(paths, "labels."+k)
	}
	return paths
}

// LabelWords returns the labels as a cell: "KEY=VALUE", sorted, separated by commas.
func LabelWords(labels map[string]string) string {
	var words []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		words = append(words, k+"="+labels[k])
	}
	return strings.Join(words, ",")
}
