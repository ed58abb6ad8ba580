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
			return t.draw(c.OutOrStdout(), args[0], records.Width())
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

// sizeText is a size for people, "?" if no blob can have it.
func sizeText(size int64) string {
	if size < 0 {
		return "?"
	}
	return humanize.IBytes(uint64(size))
}

// shortHex is how many digits of a digest are drawn.
const shortHex = 12

// draw draws the tree for a terminal of a width, 0 if that is not known, in colour unless NO_COLOR is set.
func (t *imageTree) draw(w io.Writer, name string, width int) error {
	largest, names, remarks := int64(1), 0, 0
	for i := range t.list {
		largest = max(largest, t.list[i].Size)
		names, remarks = max(names, cli.Columns(t.list[i].title())), max(remarks, len(t.list[i].remark()))
	}
	others := 2 + shortHex + 2 + len("1023 MiB") + 2 + remarks
	if width > 0 {
		names = min(names, max(width-others, 1))
	}
	paint := func(colour cli.Colour, s string) string {
		if !cli.HasColour(os.Stdout) {
			return s
		}
		return colour.Paint(s)
	}
	if _, err := fmt.Fprintln(w, cli.Fit(name, width)); err != nil {
		return err
	}
	for i := range t.list {
		b := &t.list[i]
		title := cli.Cut(b.title(), names)
		space := strings.Repeat(" ", names-cli.Columns(title))
		text := fmt.Sprintf("%s%s  %.*s  %8s  %-*s", title, space, shortHex, b.Digest.Encoded(), sizeText(b.Size), remarks, b.remark())
		extent := ""
		if room := min(barWidth, width-names-others-1); room > 0 && !b.Again {
			extent = " " + paint(cli.Blue, bar(b.Size, largest, room))
		}
		if extent == "" {
			text = cli.Fit(strings.TrimRight(text, " "), width)
		}
		switch {
		case !b.Here:
			text = paint(cli.Red, text)
		case b.Names > 0:
			text = paint(cli.Cyan, text)
		}
		if _, err := fmt.Fprintln(w, text+extent); err != nil {
			return err
		}
	}
	return nil
}

// title returns what a line of the tree begins with.
func (b *branch) title() string {
	stem := ""
	for i, last := range b.last {
		stem += map[[2]bool]string{{false, false}: "│  ", {false, true}: "   ", {true, false}: "├─ ", {true, true}: "└─ "}[[2]bool{i == len(b.last)-1, last}]
	}
	switch {
	case b.Platform != "":
		return stem + b.Kind + " " + b.Platform
	case b.Kind == "referrer" || b.Kind == "blob":
		return stem + b.Kind + " " + cli.Printable(b.Type)
	}
	return stem + b.Kind
}

// remark returns what is to be said of a branch in a few words.
func (b *branch) remark() string {
	switch {
	case b.Again:
		return "as above"
	case !b.Here:
		return "not here"
	case b.Names == 1:
		return "1 other name"
	case b.Names > 1:
		return fmt.Sprintf("%d other names", b.Names)
	}
	return ""
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
			fmt.Fprintf(&b, "\t%q [label=\"%s\\n%.19s\\n%s\" style=%q];\n", n.Digest, label, n.Digest, sizeText(n.Size), style)
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
