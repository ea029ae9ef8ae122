#pragma once
#include "crash_run.h"
