package cli

import (
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// allTypes is the value of --referrers without a type.
const allTypes = "all"

// Referrers is the value of --referrers.
type Referrers struct{ values []string }

// ReferrersFlag registers --referrers.
func ReferrersFlag(f *pflag.FlagSet, verb string) *Referrers {
	r := &Referrers{}
	f.StringArrayVar(&r.values, "referrers", nil, verb+" the referrers too, or those of artifact type `TYPE,…` alone; may be repeated")
	f.Lookup("referrers").NoOptDefVal = allTypes
	return r
}

// Wanted reports whether referrers are wanted, and returns the artifact types. An empty list means all types.
func (r *Referrers) Wanted() (types []string, wanted bool, err error) {
	types = strings.Split(strings.Join(r.values, ","), ",")
	switch {
	case len(r.values) == 0:
		return nil, false, nil
	case slices.Contains(types, allTypes):
		return nil, true, nil
	case slices.ContainsFunc(types, notType):
		return nil, false, Usagef("--referrers wants types of artifacts, such as application/spdx+json, or %s; got %.80q", allTypes, strings.Join(types, ","))
	}
	return types, true, nil
}

// notType reports whether a value of --referrers is not an artifact type.
func notType(s string) bool {
	blank := func(r rune) bool { return r <= ' ' || r > '~' }
	return s != allTypes && (!strings.Contains(s, "/") || strings.ContainsFunc(s, blank))
}
