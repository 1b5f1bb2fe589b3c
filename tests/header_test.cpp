#include "tests/header_test.c"
