package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/image"
	"distkit/image/look"

	"github.com/spf13/cobra"
)

// parts are the parts of an image that can be compared.
var parts = []string{"config", "layers", "files"}

func newDiff() *cobra.Command {
	c := &cobra.Command{
		Use:   "diff [flags] NAME|DIGEST NAME|DIGEST",
		Short: "list in what two images differ: config, layers and files",
		Args:  cobra.ExactArgs(2),
	}
	f := newPlatformFlags(c)
	only := c.Flags().StringSlice("only", parts, "compare only these `PARTS`: config, layers, files")
	times := c.Flags().Bool("times", false, "files of which only the time of modification differs, too")
	records := cli.NewRecords(c, "KEY", "PART", "CHANGE", "WHAT", "OLD", "NEW")
	c.RunE = func(c *cobra.Command, args []string) error {
		for _, p := range *only {
			if !slices.Contains(parts, p) {
				return cli.Usagef("--only: %q is not one of %s", p, strings.Join(parts, ", "))
			}
		}
		var contents [2]image.Contents
		var layers [2][]look.Layer
		for i, ref := range args {
			w, d, err := f.walker(c.Context(), ref)
			if err != nil {
				return err
			}
			if contents[i], err = w.Contents(c.Context(), d); err != nil {
				return fmt.Errorf("%s: %w", ref, err)
			}
			layers[i] = look.Of(w.Store, contents[i].Layers)
		}
		d := differ{records}
		var err error
		if slices.Contains(*only, "config") {
			err = d.config(contents[0].Config, contents[1].Config)
		}
		if err == nil && slices.Contains(*only, "layers") {
			err = d.layers(layers[0], layers[1])
		}
		if err == nil && slices.Contains(*only, "files") {
			err = look.Diff(c.Context(), layers[0], layers[1], *times, maxTree, d.file)
		}
		return cmp.Or(err, records.Close())
	}
	return c
}

// maxTree bounds the memory for the list of an image's files.
const maxTree = 1 << 30

// A difference is one record of the output.
type difference struct {
	Part   string   `json:"part"`
	Change string   `json:"change"` // A, C or D
	Key    string   `json:"key"`    // a path, a layer's digest, or a field of the config
	What   []string `json:"what,omitempty"`
	Old    any      `json:"old,omitempty"`
	New    any      `json:"new,omitempty"`
}

type differ struct{ *cli.Records }

func (d differ) write(v difference) error {
	text := func(v any) cli.Name {
		switch v := v.(type) {
		case nil:
			return ""
		case json.RawMessage:
			return cli.Name(v)
		}
		return cli.Name(fmt.Sprint(v))
	}
	return d.Write(v, cli.Name(v.Key), v.Part, v.Change, strings.Join(v.What, ","), text(v.Old), text(v.New))
}

// config compares the fields of two configs by their values as JSON.
func (d differ) config(a, b []byte) error {
	old, err := fields(a)
	if err != nil {
		return err
	}
	now, err := fields(b)
	if err != nil {
		return err
	}
	all := maps.Clone(old)
	maps.Copy(all, now)
	for _, key := range slices.Sorted(maps.Keys(all)) {
		v := difference{Part: "config", Change: "C", Key: key}
		x, inOld := old[key]
		y, inNew := now[key]
		switch {
		case !inOld:
			v.Change, v.New = "A", y
		case !inNew:
			v.Change, v.Old = "D", x
		case bytes.Equal(x, y):
			continue
		default:
			v.Old, v.New = x, y
		}
		if err := d.write(v); err != nil {
			return err
		}
	}
	return nil
}

// fields returns the fields of an image's config by name. The fields of "config", the members of objects in it, and the
// variables of the environment are listed one by one. Layers are compared separately, and the history is not compared.
func fields(config []byte) (map[string]json.RawMessage, error) {
	var top map[string]json.RawMessage
	if err := image.Decode(config, &top); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	delete(top, "rootfs")
	delete(top, "history")
	list := map[string]json.RawMessage{}
	var add func(name string, raw json.RawMessage, depth int)
	add = func(name string, raw json.RawMessage, depth int) {
		var object map[string]json.RawMessage
		if depth > 0 && json.Unmarshal(raw, &object) == nil && object != nil {
			for k, v := range object {
				add(name+"."+k, v, depth-1)
			}
			return
		}
		var env []string
		if name == "config.Env" && json.Unmarshal(raw, &env) == nil {
			for _, e := range env {
				k, v, _ := strings.Cut(e, "=")
				value, _ := json.Marshal(v) // can't fail for a string
				list[name+"."+k] = value
			}
			return
		}
		var compact bytes.Buffer
		if json.Compact(&compact, raw) == nil {
			list[name] = compact.Bytes()
		}
	}
	for k, v := range top {
		add(k, v, 2)
	}
	return list, nil
}

// layers lists the layers that only one image has.
func (d differ) layers(a, b []look.Layer) error {
	has := func(list []look.Layer, l look.Layer) bool {
		return slices.ContainsFunc(list, func(o look.Layer) bool { return o.DiffID == l.DiffID })
	}
	for i, side := range []struct {
		change     string
		own, other []look.Layer
	}{{"D", a, b}, {"A", b, a}} {
		for n, l := range side.own {
			if has(side.other, l) {
				continue
			}
			v, text := difference{Part: "layers", Change: side.change, Key: string(l.Digest)}, fmt.Sprintf("layer %d, %d bytes", n+1, l.Size)
			if i == 0 {
				v.Old = text
			} else {
				v.New = text
			}
			if err := d.write(v); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d differ) file(f look.Difference) error {
	v := difference{Part: "files", Change: f.Change, Key: f.Path, What: f.What}
	if f.A != nil {
		v.Old = f.A
	}
	if f.B != nil {
		v.New = f.B
	}
	return d.write(v)
}
