package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func newTree() *cobra.Command {
	c := &cobra.Command{
		Use:   "tree [flags] NAME|DIGEST",
		Short: "show what an image consists of: index, manifests, configs, layers, referrers",
		Args:  cobra.ExactArgs(1),
	}
	f, all := newFlags(c), true
	f.allPlatforms = &all
	dot := c.Flags().Bool("dot", false, "print a graph in the language of Graphviz")
	records := cli.NewRecords(c, "DIGEST", "KIND", "SIZE", "STATE", "NAMES", "PLATFORM", "PARENT", "TYPE")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		t := &imageTree{docs: map[digest.Digest]image.Node{}, here: map[digest.Digest]bool{}, names: map[digest.Digest]int{}, shown: map[digest.Digest]bool{},
			referrers: map[digest.Digest][]v1.Descriptor{}}
		if err := t.read(c.Context(), w, f.names, d, args[0]); err != nil {
			return err
		}
		t.flatten(d, 0, "", "", nil)
		switch {
		case *dot:
			return t.dot(c.OutOrStdout())
		case records.Table():
			return t.draw(c.OutOrStdout(), args[0])
		}
		for _, b := range t.list {
			if err := records.Write(b, b.Digest, b.Kind, cli.Size(b.Size), b.state(), b.Names, b.Platform, b.Parent, b.Type); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}

// A branch is a blob in the tree.
type branch struct {
	Digest   digest.Digest `json:"digest"`
	Kind     string        `json:"kind"` // index, manifest, config, layer, referrer or blob
	Size     int64         `json:"size"`
	Here     bool          `json:"here"`
	Names    int           `json:"names"` // number of other names that have it
	Platform string        `json:"platform,omitempty"`
	Parent   digest.Digest `json:"parent,omitempty"`
	Type     string        `json:"type"` // type of artifact, or media type
	Again    bool          `json:"again,omitempty"`
	Depth    int           `json:"depth"`
	last     []bool        // for it and each ancestor: whether it is the last child of its parent
}

func (b *branch) state() string {
	if b.Here {
		return "here"
	}
	return "missing"
}

type imageTree struct {
	docs      map[digest.Digest]image.Node
	here      map[digest.Digest]bool
	names     map[digest.Digest]int
	referrers map[digest.Digest][]v1.Descriptor
	shown     map[digest.Digest]bool
	list      []branch
}

// read finds the parts of the image, the manifests that refer to it, and the other names that have any of these.
func (t *imageTree) read(ctx context.Context, w image.Walker, names *image.Names, d v1.Descriptor, ref string) error {
	w.Tally = &image.Tally{}
	note := func(n image.Node) error {
		t.here[n.Digest] = n.Here
		if n.Type != "" {
			t.docs[n.Digest] = n
		}
		return nil
	}
	if err := w.Walk(ctx, d, note); err != nil {
		return err
	}
	// A referrer may have referrers, so the whole list is read repeatedly.
	for found, again := true, image.MaxDepth+1; found && again > 0; again-- {
		found = false
		err := names.Referrers(func(r v1.Descriptor, subject digest.Digest) error {
			if _, known := t.here[r.Digest]; known {
				return nil
			}
			if _, ours := t.here[subject]; !ours {
				return nil
			}
			found = true
			t.referrers[subject] = append(t.referrers[subject], r)
			return w.Walk(ctx, r, note)
		})
		if err != nil {
			return err
		}
	}
	list, err := names.Read()
	if err != nil {
		return err
	}
	for img, err := range list.All() {
		if err != nil || img.Name == ref {
			continue
		}
		// Errors in another image, which may be damaged or too large, are reported when that one is read.
		err := (image.Walker{Store: w.Store}).Walk(ctx, img.Target, func(n image.Node) error {
			if _, ours := t.here[n.Digest]; ours && !t.shown[n.Digest] {
				t.shown[n.Digest] = true
				t.names[n.Digest]++
			}
			return nil
		})
		clear(t.shown)
		if err != nil && !errdefs.IsDataLoss(err) && !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// flatten lists a blob and its descendants. A document that occurs again is listed without its descendants.
func (t *imageTree) flatten(d v1.Descriptor, depth int, parent digest.Digest, kind string, last []bool) {
	n, document := t.docs[d.Digest]
	b := branch{Digest: d.Digest, Size: d.Size, Here: t.here[d.Digest], Names: t.names[d.Digest], Parent: parent, Depth: depth, last: last,
		Type: cmp.Or(d.ArtifactType, n.Type, d.MediaType), Kind: cmp.Or(kind, "blob")}
	switch {
	case kind != "":
	case image.IsIndex(cmp.Or(n.Type, d.MediaType)):
		b.Kind = "index"
	case image.IsManifest(cmp.Or(n.Type, d.MediaType)):
		b.Kind = "manifest"
	}
	if d.Platform != nil {
		b.Platform = cli.Printable(platforms.FormatAll(*d.Platform))
	}
	b.Again = document && t.shown[d.Digest]
	t.list = append(t.list, b)
	if !document || b.Again {
		return
	}
	t.shown[d.Digest] = true
	referrers := t.referrers[d.Digest]
	for i, c := range n.Children {
		kind := ""
		if image.IsManifest(n.Type) {
			kind = "layer"
			if i == 0 {
				kind = "config"
			}
		}
		t.flatten(c, depth+1, d.Digest, kind, below(last, i == len(n.Children)-1 && len(referrers) == 0))
	}
	for i, r := range referrers {
		t.flatten(r, depth+1, d.Digest, "referrer", below(last, i == len(referrers)-1))
	}
}

func below(above []bool, last bool) []bool { return append(append([]bool(nil), above...), last) }

// barWidth is the largest width of a bar.
const barWidth = 24

// bar returns a bar for a size in proportion to the largest one. Sizes come from manifests and are not trusted.
func bar(size, largest int64, room int) string {
	return strings.Repeat("█", int(math.Ceil(float64(max(size, 0))/float64(largest)*float64(room))))
}

// draw draws the tree for a terminal, in colour unless NO_COLOR is set.
func (t *imageTree) draw(w io.Writer, name string) error {
	largest := int64(1)
	for _, b := range t.list {
		largest = max(largest, b.Size)
	}
	width, _ := cli.IsTerminal(os.Stdout)
	paint := func(colour int, s string) string {
		if os.Getenv("NO_COLOR") != "" {
			return s
		}
		return fmt.Sprintf("\x1b[%dm%s\x1b[0m", colour, s)
	}
	if _, err := fmt.Fprintln(w, cli.Printable(name)); err != nil {
		return err
	}
	for _, b := range t.list {
		stem := ""
		for i, last := range b.last {
			stem += map[[2]bool]string{{false, false}: "│  ", {false, true}: "   ", {true, false}: "├─ ", {true, true}: "└─ "}[[2]bool{i == len(b.last)-1, last}]
		}
		what, short := b.Kind, string(b.Digest)
		if algorithm, hex, ok := strings.Cut(short, ":"); ok && len(hex) > 12 {
			short = algorithm + ":" + hex[:12]
		}
		switch {
		case b.Platform != "":
			what += " " + b.Platform
		case b.Kind == "referrer" || b.Kind == "blob":
			what += " " + cli.Printable(b.Type)
		}
		size := humanize.IBytes(uint64(b.Size))
		notes := ""
		switch {
		case b.Again:
			notes = "as above"
		case !b.Here:
			notes = "not here"
		case b.Names == 1:
			notes = "1 other name"
		case b.Names > 1:
			notes = fmt.Sprintf("%d other names", b.Names)
		}
		line := []rune(fmt.Sprintf("%-44s %s %9s  %-14s", stem+what, short, size, notes))
		if width > 0 && len(line) > width {
			line = line[:width]
		}
		text, extent := strings.TrimRight(string(line), " "), ""
		if room := min(barWidth, width-len(line)-1); room > 0 && !b.Again {
			extent = bar(b.Size, largest, room)
		}
		switch {
		case !b.Here:
			text = paint(31, text)
		case b.Names > 0:
			text = paint(36, text)
		}
		if extent != "" {
			text += strings.Repeat(" ", 1+len(line)-len([]rune(strings.TrimRight(string(line), " ")))) + paint(34, extent)
		}
		if _, err := fmt.Fprintln(w, text); err != nil {
			return err
		}
	}
	return nil
}

// dot writes the tree in Graphviz's language. Digests need no escaping.
func (t *imageTree) dot(w io.Writer) error {
	var b strings.Builder
	b.WriteString("digraph image {\n\trankdir=LR;\n\tnode [shape=box];\n")
	seen := map[digest.Digest]bool{}
	for _, n := range t.list {
		if !seen[n.Digest] {
			seen[n.Digest] = true
			label := n.Kind
			if n.Platform != "" {
				label += " " + strings.NewReplacer(`\`, "?", `"`, "?").Replace(n.Platform)
			}
			style := map[bool]string{true: "solid", false: "dashed"}[n.Here]
			if n.Names > 0 {
				style += ",bold"
			}
			fmt.Fprintf(&b, "\t%q [label=\"%s\\n%.19s\\n%s\" style=%q];\n", n.Digest, label, n.Digest, humanize.IBytes(uint64(n.Size)), style)
		}
		if n.Parent != "" {
			arrow := ""
			if n.Kind == "referrer" {
				arrow = " [dir=back style=dotted]"
			}
			fmt.Fprintf(&b, "\t%q -> %q%s;\n", n.Parent, n.Digest, arrow)
		}
	}
	b.WriteString("}\n")
	_, err := io.WriteString(w, b.String())
	return err
}
