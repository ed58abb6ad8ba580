package main

import (
	"slices"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/image/copygraph"
)

// allTypes is the value of --referrers without one.
const allTypes = "all"

// notType reports whether a value of --referrers can't be a type of artifacts.
func notType(s string) bool {
	blank := func(r rune) bool { return r <= ' ' || r > '~' }
	return s != allTypes && (!strings.Contains(s, "/") || strings.ContainsFunc(s, blank))
}

// setTypes sets the types of the referrers that are copied. It reports whether any are.
func (p places) setTypes(g *copygraph.Copy) (wanted bool, err error) {
	types := strings.Split(strings.Join(p.referrers, ","), ",")
	switch {
	case len(p.referrers) == 0:
		return false, nil
	case slices.Contains(types, allTypes):
		return true, nil
	case slices.ContainsFunc(types, notType):
		return false, cli.Usagef("--referrers wants types of artifacts, such as application/spdx+json, or %s; got %.80q", allTypes, strings.Join(types, ","))
	}
	g.ArtifactTypes = types
	return true, nil
}
